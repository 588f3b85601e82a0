"""Small stand-ins that tests build on the spot: a tokenizer, a full disk."""

import ctypes
import os
import resource
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.engine.chat import ChatRenderer

_WORDS = "it was a great film and the plot is terrible but not so bad yes no maybe"
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') %}{{ raise_exception('no such role') }}{% "
    "endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(adds_bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 320 tokens; as OPT's, it puts ``</s>`` in front of every text, and texts end with
    it."""
    bpe = ByteLevelBPETokenizer()
    text = [" ".join([_WORDS] * 4), *(f" {word}" for word in _WORDS.split() for _ in range(4))]
    bpe.train_from_iterator(
        text, vocab_size=320, min_frequency=2, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False
    )
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        bpe._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="</s>", bos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def renderer(tokenizer: PreTrainedTokenizerFast) -> ChatRenderer:
    """Of messages, by the tokenizer's own chat template, as a server has it that is given none."""
    return ChatRenderer(tokenizer, ChatSettings(model_path=tokenizer.name_or_path))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes: a write stops short there, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Executor | None]:
    """A child process that sees a file system of that size in ``folder``; None where the kernel does not allow it."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as child:
        yield child if child.submit(_mount_tmpfs, str(folder), size).result() else None


def _mount_tmpfs(folder: str, size: str) -> bool:
    """Mount in namespaces of this process's own, so that nothing is left behind and nobody else sees it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode()) == 0
