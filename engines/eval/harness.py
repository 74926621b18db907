"""lm-eval-harness drives an engine directory: the model `smc`.

    python -m smc_engines.eval.harness run --model smc --tasks gsm8k --apply_chat_template \\
        --model_args engine=engines/llama-8b-tp1,mode=smc,num_particles=8,num_draft_tokens=8,temperature=0.7

The command is lm_eval's own with one model more; every sampling parameter may stand in --model_args and wins over what a task
asks for (most tasks ask for greedy decoding, which is the same answer in every mode). Needs the extra `harness`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
from typing import Any

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise SystemExit(
        f"smc harness: lm_eval is not usable ({error}), expected the extra harness: pip install 'smc-engine[harness]'"
    ) from error

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.text import Tokenizer
from smc_plugin.errors import ConfigError, SmcError

_PARAMETERS = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
_PASSED = ("temperature", "top_p", "top_k", "min_p")
_DEVICE_OF_NOBODY = "cuda:0"  # what the harness says where its command line names no device
_HEEDED = {*_PASSED, "until", "max_gen_toks", "do_sample"}


class SmcModel(LM):
    """An engine directory as a model of the harness.

    Args:
        engine: engine directory.
        device: auto, cpu or cuda.
        groups: requests decoded together.
        seed: of the first request; each has a seed of its own.
        batch_size, max_batch_size: what the harness always passes; groups decides.
        given: fields of SamplingParams.
    Raises:
        ConfigError: an argument is none of these.
    """

    def __init__(
        self,
        engine: str,
        device: str | None = None,
        groups: int = 16,
        seed: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **given: Any,
    ) -> None:
        super().__init__()
        unknown = given.keys() - _PARAMETERS
        if unknown:
            raise ConfigError(
                f"--model_args names {', '.join(sorted(unknown))}, expected engine, device, groups, seed or one of "
                f"{', '.join(sorted(_PARAMETERS))}: correct it"
            )
        chosen = ExecutorConfig.device if device in (None, _DEVICE_OF_NOBODY) else device
        config = ExecutorConfig(device=chosen, max_groups=int(groups))
        self._executor = Executor.from_engine_dir(engine, config)
        if self._executor.engine.tokenizer is None:
            raise ConfigError(f"engine {engine} has no tokenizer, the harness works on text: build it with one")
        self._given, self._seed, self._name = given, int(seed), str(engine)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts; `until` becomes stop strings and `max_gen_toks` max_tokens."""
        pairs: list[Any] = [request.args for request in requests]
        params = [self._params(dict(asked), self._seed * 1_000_003 + index) for index, (_, asked) in enumerate(pairs)]
        tokenizer = self._executor.engine.tokenizer
        assert tokenizer is not None
        outputs = self._executor.generate([prompt_ids(tokenizer, prompt) for prompt, _ in pairs], params)
        for output in outputs:
            if output.error is not None:  # its text would count as a wrong answer
                raise output.error
        return [output.text for output in outputs]

    def _params(self, asked: dict[str, Any], seed: int) -> SamplingParams:
        unknown = asked.keys() - _HEEDED
        if unknown:
            raise ConfigError(
                f"the task's generation arguments name {', '.join(sorted(unknown))}, expected some of "
                f"{', '.join(sorted(_HEEDED))}: set others with --gen_kwargs or choose another task"
            )
        until = asked.get("until") or []
        values: dict[str, Any] = {name: asked[name] for name in _PASSED if asked.get(name) is not None}
        if asked.get("do_sample") is False:
            values["temperature"] = 0.0
        values |= {"stop": [until] if isinstance(until, str) else list(until), "seed": seed}
        values["max_tokens"] = int(asked.get("max_gen_toks") or SamplingParams.max_tokens)
        return SamplingParams.from_mapping(values | self._given)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: no setting of the engine changes what the target finds likely."""
        raise ConfigError(
            "the task scores given texts, expected one that generates: scores are those of the target alone in every mode, "
            "get them from its checkpoint with --model hf"
        )

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse, see loglikelihood."""
        self.loglikelihood(requests)
        return []

    @property
    def tokenizer_name(self) -> str:
        """What the harness files its cached prompts under."""
        return self._name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The engine's own template; others are not chosen between."""
        tokenizer = self._executor.engine.tokenizer
        return tokenizer.template if chat_template and tokenizer is not None else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as the text of a prompt.

        Args:
            add_generation_prompt: False where the task has begun the last message itself, which the model is to go on with.
        """
        tokenizer = self._executor.engine.tokenizer
        assert tokenizer is not None
        text = tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)[0]
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt; a begin token that a chat template wrote out is not put before it once more."""
    whole, bare = tokenizer.encode(prompt), tokenizer.encode(prompt, add_special_tokens=False)
    return bare if whole[:1] == bare[:1] and whole[1:2] == bare[:1] else whole


register_model("smc")(SmcModel)  # not as a decorator, which would hide the class's own type

if __name__ == "__main__":
    try:
        cli_evaluate()
    except SmcError as problem:
        raise SystemExit(f"smc harness: {problem}") from None
