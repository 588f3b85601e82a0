"""What a row's loss is: which tokens run where, what is shared, and what is read off."""
