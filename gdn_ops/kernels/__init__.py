"""Floor 1: tensors in, tensors out. No torch.library, no validation, no autograd."""
