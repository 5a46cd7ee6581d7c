"""R2M inside other trainers. Each module needs its framework at run time only, and names it in its errors."""
