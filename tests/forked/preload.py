"""What the server does once: a worker's imports, and the rules of transformers that take 0.3 s to build."""

import gc

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
import transformers.models.qwen2.modeling_qwen2  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import tunemap.data.sources
import tunemap.data.tokens
import tunemap.evaluate
import tunemap.models
import tunemap.training.assemble
import tunemap.training.checkpoint
import tunemap.training.observe
import tunemap.training.weights
import tunemap.training.worker  # noqa: F401

get_checkpoint_conversion_mapping("qwen2")
gc.collect()
gc.freeze()  # as the worker's own imports are: or every collection in every process would walk over all of them
