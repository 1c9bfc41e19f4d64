"""What does preconditioning cost, here and elsewhere?"""
