"""What other trainers were told about a dataset, made into configs of ours. Their files are only read."""
