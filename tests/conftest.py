"""Set-up that every test shares."""

import os
import signal

import torch

# Kernels' tests run in Triton's interpreter where there is no GPU. It must be set before triton is
# imported, and transformers, which other tests import, does that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests start processes of their own: two threads in each would fight over the cores.
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
