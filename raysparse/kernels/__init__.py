"""Ways to skip zeros: native kernels for CPUs, and what chooses between them and dense arithmetic.

This layer works on tensors, bits and numbers. It knows no topology, no model and no config of a run, so the pure core
(`raysparse.sparsity`) may use it too: selection and random growth run here, with the same bits as in plain torch.
"""
