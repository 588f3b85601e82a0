"""Random sequences of what tenants do to a server, good and bad; every answer is held against PEFT alone."""

import copy
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from live_server import MODEL, LiveServer, reviews

TOLERANCE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
NEW_TOKENS = 4
ACTIONS = 7
"""Of a sequence, before its last requests."""

PROMPTS = [
    "the plot is thin, but the acting is superb. It was",
    "never again will i eat here. It was",
    "the staff is friendly and the food fresh. It was",
    "It was so. the room is small, the bed hard. It was",
    "the plot is thin, but the acting is superb. so",
    "no such words in here",
    "the staff is friendly and the food fresh, and then it began to rain. It was a great evening",
    "never again will i eat here",
]


@dataclass
class Tenant:
    """An adapter that is served: ``folder`` has its weights, and None says that they overflow. ``activated``: as
    aLoRA."""

    name: str
    folder: Path | None
    activated: bool
    job_id: str | None = None


class Oracle:
    """The base model and adapters in PEFT, one at a time. Keeps the adapters' folders for loading: good, huge,
    infinite, none."""

    def __init__(self, root: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self._base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
        invocation = self.tokenizer(" It was", add_special_tokens=False).input_ids
        self.folders: dict[tuple[str, bool], Path] = {}
        for activated in (False, True):
            for kind in ("good", "other", "huge", "nan", "inf"):
                settings = {"alora_invocation_tokens": invocation} if activated else {}
                self.folders[kind, activated] = self._save(root / f"{kind}-{activated}", kind, settings)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def model(self, folder: Path | None):
        return self._base if folder is None else PeftModel.from_pretrained(copy.deepcopy(self._base), folder).eval()

    def wrong(self, model, prompt: list[int], answer: dict) -> str | None:
        """What is wrong with an answer; None for nothing. It must hold the likeliest tokens, with the model's
        log-probabilities."""
        tokens = answer["output_ids"]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(input_ids=torch.tensor([prompt + tokens])).logits[0].double(), -1)
        positions = range(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        given = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
        for position, token, value in zip(positions, tokens, given, strict=True):
            right, best = log_probs[position, token].item(), log_probs[position].max().item()
            if not (abs(value - right) <= TOLERANCE and right >= best - TOLERANCE):
                return f"log-probability {value} of token {token} at {position}, in PEFT {right} and {best} at best"
        if (first := answer["meta_info"].get("input_token_logprobs")) and len(first) > 1:
            for position, (value, token, *_) in enumerate(first[1:], 1):
                right = log_probs[position - 1, token].item()
                if not abs(value - right) <= TOLERANCE:
                    return f"log-probability {value} of the prompt's token {position}, in PEFT {right}"
        return None

    def _save(self, folder: Path, kind: str, settings: dict) -> Path:
        torch.manual_seed(len(kind))
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        model = get_peft_model(copy.deepcopy(self._base), config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(0, 0.05)
                    if kind == "huge":
                        weight.sign_().mul_(1e30)
                    elif kind in ("nan", "inf"):
                        weight[0, 0] = float(kind)
        model.save_pretrained(folder)
        return folder


@dataclass
class Sequence:
    """``run`` does what ``seed`` says; ``done`` is what it has done so far."""

    server: LiveServer
    oracle: Oracle
    file: str
    seed: int
    done: list[str] = field(default_factory=list)
    answers: int = 0

    def run(self) -> None:
        """Raises AssertionError with the seed and the sequence where an answer is wrong."""
        self.draw = random.Random(self.seed)
        self.tenants: list[Tenant] = []
        self.jobs = 0
        try:
            for _ in range(ACTIONS):
                self.draw.choice(
                    [
                        self.train,
                        self.update_to_overflow,
                        self.update_huge,
                        self.update,
                        self.publish,
                        self.load,
                        self.load_bad,
                        self.cancel,
                        self.flush,
                        self.ask,
                    ]
                )()
            self.ask()
            self.leave()
        except Exception as error:
            raise AssertionError(f"seed {self.seed}: {' / '.join(self.done)}: {error}") from error

    # --- what tenants do ----------------------------------------------------------------------------------------------

    def train(self) -> Tenant:
        activated = self.draw.random() < 0.7
        job = self._create(activated, self.draw.choice([1, 3]))
        self.done.append(f"train {job.id}")
        self.server.wait_for(job.id, "succeeded")
        tenant = Tenant(self._job_name(), None, activated, job.id)
        tenant.folder = self._version(tenant)
        self.tenants.append(tenant)
        return tenant

    def update(self) -> None:
        tenant = self._trained()
        self._update(tenant, self.draw.uniform(-2, 2), 1e-3, 200)
        if tenant.folder is not None:
            tenant.folder = self._version(tenant)

    def update_huge(self) -> None:
        """Finite weights whose products are not."""
        tenant = self._trained()
        if tenant.folder is not None:
            self._update(tenant, self.draw.choice([-3e18, 3e18]), 1.0, 200)
            tenant.folder = None

    def update_to_overflow(self) -> None:
        tenant = self._trained()
        error = self._update(tenant, self.draw.choice([-1e30, 1e30]), 1e6, 400)
        assert error["param"] == "projected_grad", error

    def publish(self) -> None:
        tenant = self._trained()
        self.done.append(f"publish {tenant.name}")
        self.server.http.post(f"/mezo/jobs/{tenant.job_id}/publish", json={}).raise_for_status()

    def load(self) -> None:
        self._load(self.draw.choice(["good", "other", "huge"]), 200)

    def load_bad(self) -> None:
        self._load(self.draw.choice(["nan", "inf"]), 400)

    def cancel(self) -> None:
        """With requests while it trains."""
        job = self._create(self.draw.random() < 0.7, 100_000)
        self.done.append(f"start {job.id}")
        self.server.wait_for(job.id, "running")
        self.ask()
        self.done.append("cancel")
        self.server.client.fine_tuning.jobs.cancel(job.id)

    def flush(self) -> None:
        self.done.append("flush")
        self.server.until(lambda: self.server.http.post("/flush_cache").status_code == 200)

    def ask(self) -> None:
        """A mixed batch of the base model and all adapters."""
        who: list[Tenant | None] = [None, None, *self.tenants]
        requests = [
            (self.draw.choice(who), self.draw.choice(PROMPTS), self.draw.random() < 0.3)
            for _ in range(3 + 2 * len(who))
        ]
        self.done.append(f"ask {len(requests)}")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda request: self._generate(*request), requests))
        models = {None: self.oracle.model(None)}
        for (tenant, text, _), response in zip(requests, answers, strict=True):
            self._check(tenant, text, response, models)

    def leave(self) -> None:
        """Give all names back."""
        for tenant in self.tenants:
            if tenant.job_id is not None:
                self.server.http.delete(f"/v1/models/{self.server.model}:{tenant.name}").raise_for_status()
            else:
                self.server.http.post("/unload_lora_adapter", json={"lora_name": tenant.name}).raise_for_status()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _create(self, activated: bool, max_steps: int):
        self.jobs += 1
        return self.server.create_job(
            self.file,
            suffix=self._job_name(),
            seed=self.seed,
            invocation=" It was" if activated else None,
            tuning="alora" if activated else "lora",
            max_steps=max_steps,
            num_perturbations=1,
            estimator="two_sided",
            learning_rate=1e-3,
            logging_steps=1,
            r=4,
            batch_size=2,
            scale_by_loss_std=False,
        )

    def _job_name(self) -> str:
        return f"job-{self.seed}-{self.jobs}"

    def _trained(self) -> Tenant:
        trained = [tenant for tenant in self.tenants if tenant.job_id is not None]
        return self.draw.choice(trained) if trained else self.train()

    def _version(self, tenant: Tenant) -> Path:
        (folder,) = (self.server.directory / "jobs" / tenant.job_id / "adapters").iterdir()
        return folder

    def _update(self, tenant: Tenant, grad: float, rate: float, status: int) -> dict:
        self.done.append(f"update {tenant.name} by {grad:g} x {rate:g}")
        body = {"zo_random_seed": self.draw.randrange(2**32), "projected_grad": [grad], "learning_rate": rate}
        response = self.server.http.post(f"/mezo/jobs/{tenant.job_id}/update", json=body)
        assert response.status_code == status, response.text
        return response.json().get("error", {})

    def _load(self, kind: str, status: int) -> None:
        activated = self.draw.random() < 0.7
        name = f"{kind}-{self.seed}-{len(self.done)}"
        self.done.append(f"load {name}{' (aLoRA)' if activated else ''}")
        folder = self.oracle.folders[kind, activated]
        response = self.server.http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        assert response.status_code == status and (status == 200 or "finite" in response.text), response.text
        if status == 200:
            self.tenants.append(Tenant(name, None if kind == "huge" else folder, activated))

    def _generate(self, tenant: Tenant | None, text: str, whole: bool):
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        body = {
            "input_ids": self.oracle.ids(text),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": 0 if whole else -1,
        }
        return self.server.http.post("/generate", json=body | ({} if tenant is None else {"lora_path": tenant.name}))

    def _check(self, tenant: Tenant | None, text: str, response, models: dict) -> None:
        self.answers += 1
        acts = tenant is not None and (not tenant.activated or " It was" in text)
        if acts and tenant.folder is None:
            assert response.status_code == 400 and f"adapter '{tenant.name}'" in response.text, (
                tenant,
                text,
                response.text,
            )
            return
        folder = tenant.folder if acts else None
        if folder not in models:
            models[folder] = self.oracle.model(folder)
        assert response.status_code == 200, (tenant, text, response.text)
        wrong = self.oracle.wrong(models[folder], self.oracle.ids(text), response.json())
        assert wrong is None, (tenant, text, wrong)


def run_sequences(
    server: LiveServer, root: Path, seeds, after: Callable[[Sequence], None] = lambda sequence: None
) -> int:
    """The number of answers that were held against PEFT."""
    oracle, file = Oracle(root), server.upload(reviews("train", 12))
    answers = 0
    for seed in seeds:
        sequence = Sequence(server, oracle, file, seed)
        sequence.run()
        answers += sequence.answers
        after(sequence)
    return answers
