"""Output constraints: checked in a process of their own, then followed token by token."""
