"""Stage one (conversations to stored hidden states), verification by serving, and the command line."""
