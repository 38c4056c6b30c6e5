import torch

torch.set_num_threads(1)  # the nets of the tests are small: threads only wait for each other
