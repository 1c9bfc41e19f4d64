"""Do the best hyperparameters of a narrow network also suit a wide one?"""
