"""What all ways of launching share: the plan of a job, where it is kept, the code it runs, the ranks of a node."""
