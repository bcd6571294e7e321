"""`posttrain --multirun`: a run for each combination of values, one after another here or as SLURM jobs, then one comparison.

plan: from arguments to jobs, all judged before the first begins; record: sweep.json; here and slurm: who runs them; ending: the
table; run: all of it in order.
"""
