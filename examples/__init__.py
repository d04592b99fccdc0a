"""Small, complete uses of locc."""
