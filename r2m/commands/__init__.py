"""What the command `r2m` does, a file for each of its commands; cli.py has the options."""
