"""Third pass: what each candidate becomes, by which rule, and why what stays float does."""
