"""What an engine's process imports, for the fork server of ``engine_process``: its children find all of it there."""

from sglang.srt.plugins import load_plugins

load_plugins()

import peft  # noqa: E402, F401
import sglang.srt.managers.scheduler  # noqa: E402, F401
import sglang.srt.mezo.training.trainer  # noqa: E402, F401
import sglang.srt.models.registry  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401
import transformers.models.opt.modeling_opt  # noqa: E402, F401
