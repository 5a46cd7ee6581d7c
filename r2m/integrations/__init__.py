"""R2M in other trainers, and other engines in its own. Each module needs its framework at run time only, and names it
in its errors."""
