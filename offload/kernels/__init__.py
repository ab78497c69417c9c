"""CPU kernels: products of few or many tokens with weights read in the checkpoint's own bytes.

    levels.py      which instructions may be used here
    jit.py         compile-time values, compiled jobs and their on-disk cache
    intrinsics.py  single operations on raw addresses
    forms.py       how weights become float32 vectors
    arrange.py     activations in the order and scale that weights come in
    dot.py         the micro-kernels: 4 weight rows times 1 to 3 tokens
    project.py     a range of a matrix's rows times any number of tokens
    linear.py      jobs for one matrix: linear layers, MLA's absorbed products
    experts.py     the job for one layer's routed experts
    memory.py      memory at an address
    portable.py    dot.py as plain loops
    scan.py        the job that looks for damaged weights
    cpu.py         CpuKernels, the face of it all

Knows addresses and shapes, not models. The threads are in offload/workers.py.
"""
