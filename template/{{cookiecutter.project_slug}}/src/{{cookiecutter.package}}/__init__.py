"""A policy learnt from demonstrations: `module` is what is trained, `data` what on."""
