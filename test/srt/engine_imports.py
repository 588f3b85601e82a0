"""What an engine's process imports, for the fork server of ``engine_process``: its children find all of it there."""

from sglang.srt.plugins import load_plugins

load_plugins()

import peft
import transformers.models.llama.modeling_llama
import transformers.models.opt.modeling_opt

import sglang.srt.managers.scheduler
import sglang.srt.mezo.training.trainer
import sglang.srt.models.registry
