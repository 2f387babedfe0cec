"""Set-up that every test shares."""

import signal

import torch

# Tests start processes of their own: two threads in each would fight over the cores.
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
