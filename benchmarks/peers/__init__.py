"""Other libraries that compute per-sample norms, variances and penalties, measured and checked beside bootgrad.

    make bench-peers

A way is what one library does for one or several quantities (`ways`). Each is compared with plain autograd in float64
(`oracle`) before it is timed, on whole networks (`measuring`, in processes of its own) and layer by layer (`cases`); one
that fails has an entry that says why. The rows become a table (`page`) and a picture (`chart`).
"""
