"""Loading, adapters, log-probabilities. Two libraries' warnings are silenced here, before anything imports them."""

import logging
import warnings

# of optional kernels, on every machine without a GPU
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft's use of a transformers attribute, at every adapter
warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
