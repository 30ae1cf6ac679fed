"""How fast the operators are, next to what the machine allows and next to others.

Run from the repository's root; nothing of this is installed::

    python -m perf gpu --out DIR          forward, backward and decode on the CUDA device, within --budget seconds
    python -m perf op --suite forward     one suite, or one --shape H,HV,N,T,K,V, on CUDA or on the CPU
    python -m perf linear                 gated linear attention (Mamba2's rule) next to FLA's simple GLA
    python -m perf train                  whole training steps of models next to FLA's and Hugging Face's
    python -m perf kernels                what a call or a training step is made of, kernel by kernel
    python -m perf cpu                    side by side with Hugging Face's torch functions and ONNX Runtime
    python -m perf nodes                  what bounds the portable rule in ONNX Runtime, node by node
    python -m perf tune --kernel K        other tiles, warps and stages of one kernel
    python -m perf plot CSV... --out DIR  pictures, drawn from the CSV files alone

What is compared runs interleaved in one process, round after round, on inputs that rotate through more memory than the
cache holds; the CSV gets a line as soon as it is measured. docs/performance.md says what the columns mean.
"""
