"""`python -m albef_ds doctor`: what of this machine, this network and this recipe would not do, and what to change.

software.py   Python, torch, DeepSpeed, optional packages, compilers, left-over build locks
hardware.py   GPUs and their driver, cores, shared memory, open files
recipe.py     the recipe and DeepSpeed's file: batches, tokeniser, weights, data
sizes.py      what a model needs: memory (an estimate) and disk, and whether there is so much
network.py    the hosts of a hostfile; with several ranks: bandwidth, latency and clocks between them
command.py    the order of all this, what is printed, and the exit status
"""

from albef_ds.doctor.finding import Finding as Finding
