"""The paper's claims at a small scale: recall, retrieval, state tracking, length extrapolation, and its ablations.

    python -m perf.claims recall needle parity text ablations --jobs 8 --budget 25 --seeds 3 --out claims
    python -m perf.claims table --out claims
    python -m perf.claims plot --out claims

Every run is one small model (``models.py``: the paper's family at one number of parameters and one size of recurrent
state) trained on one task (``tasks.py``: made from seeds; ``text.py``: the source text of Python's own library) and
then read at one or more settings. A run's rows go into ``results.csv`` when it is over; a later call with the same
``--out`` goes on with the runs that are missing. ``--budget`` is in minutes: what does not fit is left for later, and
what it cuts goes on where it stopped. ``--jobs`` runs are side by side (``workers.py``); a step of training is one CUDA
graph (``step.py``).

Claims are arXiv 2412.06464's: gating and the delta rule complement each other; Gated DeltaNet is ahead of Mamba2 and
DeltaNet in recall and at lengths beyond those of training; hybrids are ahead of all; negative eigenvalues
(arXiv 2411.12537) make parity learnable. docs/claims.md says how to read the results.
"""
