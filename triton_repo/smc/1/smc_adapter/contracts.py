"""What each served model accepts and answers, as tables, and how a request becomes sub-requests for the executor.

Three contracts serve four models: TEXT (`ensemble`, `tensorrt_llm_bls`) and IDS (`tensorrt_llm`) keep clients of the
well-known TensorRT-LLM backend working; SMC (`smc`) is this project's own and also knows the newer sampling_param_* names.

A request of batch size 2 with num_return_sequences 3 becomes 6 sub-requests: (batch_index, sequence_index) from (0, 0) to
(1, 2). With seed 7 their seeds are 7, 8, 9 in either row, so that sequences of one row differ and rows can be repeated.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smc_adapter.fields import MAX_BATCH_SIZE, MAX_WORD_BYTES, Field, InputError, read_fields

INT32_MAX = 2**31 - 1
MAX_SEQUENCES = 64
MAX_NESTING = 32
MAX_WORD_TOKENS = 256


@dataclass(frozen=True)
class SubRequest:
    """One answer to be made.

    Args:
        prompt: {"text": str}, {"ids": [int]} or {"messages": [...]}.
        echo: the prompt as it is repeated in front of an answer: text or token ids.
        params: sampling parameters by the executor's names.
        stop_sequences: token sequences that end the answer (longer than one token).
    """

    batch_index: int
    sequence_index: int
    prompt: dict[str, Any]
    echo: Any
    params: dict[str, Any]
    stop_sequences: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Parsed:
    """A checked request.

    Args:
        subs: sub-requests, row by row; empty when `stop` is set.
        stream: send text as it settles, else everything at the end.
        echo_prompt: an answer that is not streamed starts with the prompt.
        wants: names of the optional outputs to send.
        outputs: names of the outputs that the client named to the server; empty is all.
        stop: cancel the live requests with the same request id instead.
        priority: smaller goes first. timeout_ms: None is no limit.
    """

    subs: tuple[SubRequest, ...] = ()
    num_sequences: int = 1
    stream: bool = False
    echo_prompt: bool = False
    pad_id: int = 0
    wants: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    stop: bool = False
    priority: int = 0
    timeout_ms: int | None = None


@dataclass(frozen=True)
class Output:
    """One output tensor, for config.pbtxt."""

    name: str
    dtype: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Contract:
    """One kind of model.

    Args:
        inputs: every input that is known, by name.
        outputs: every output that may be sent.
        answer: text_output or output_ids: what an answer is.
    """

    inputs: dict[str, Field]
    outputs: tuple[Output, ...]
    answer: str
    _parse: Callable[[_Row], Parsed]

    def parse(
        self, arrays: Mapping[str, np.ndarray], parameters: Mapping[str, Any], outputs: Iterable[str] = ()
    ) -> Parsed:
        """Check a request and split it.

        Args:
            arrays: input tensors by name.
            parameters: the request's own parameters. Of ours, smc_priority and smc_timeout_ms count here. The HTTP endpoint
                also makes a parameter of whatever it does not know as an input.
            outputs: see Parsed.
        Raises:
            InputError: something is wrong or not supported.
        """
        for name in parameters:
            if name not in PARAMETERS and not name.startswith("triton_"):
                close = difflib.get_close_matches(name, [*self.inputs, *PARAMETERS], n=1)
                hint = f"did you mean {close[0]!r}?" if close else "leave it out"
                raise InputError(f"unknown input or parameter {name!r}, expected one of config.pbtxt's inputs: {hint}")
        if "stop" in arrays and bool(np.all(self.inputs["stop"].read(arrays["stop"]))):
            return Parsed(stop=True)
        values = read_fields(self.inputs, arrays)
        parsed = self._parse(_Row(self.inputs, values))
        limit = len(parsed.subs)
        if limit > MAX_SEQUENCES:
            raise InputError(f"the request asks {limit} answers, expected at most {MAX_SEQUENCES}: split it")
        priority = _parameter(parameters, "smc_priority", parsed.priority, -INT32_MAX, INT32_MAX)
        timeout_ms = _parameter(parameters, "smc_timeout_ms", parsed.timeout_ms, 1, INT32_MAX)
        chosen = {"priority": priority or 0, "timeout_ms": timeout_ms, "outputs": frozenset(outputs)}
        return Parsed(**{**vars(parsed), **chosen})


# ours, and those that the server or its protocol gives a meaning
PARAMETERS = (
    *("smc_priority", "smc_timeout_ms", "smc_probe", "smc_error_outputs"),
    *("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"),
)


def _parameter(parameters: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = parameters.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"request parameter {name} must be an integer in [{low}, {high}], got {value!r}: change it")
    return value


class _Row:
    """Values of a request's inputs, one row at a time."""

    def __init__(self, table: Mapping[str, Field], values: Mapping[str, list[Any]]) -> None:
        self._table = table
        self._values = values
        self.size = max((len(rows) for rows in values.values()), default=1)

    def get(self, name: str, row: int = 0, default: Any = None) -> Any:
        return self._values[name][row] if name in self._values else default

    def uniform(self, name: str, default: Any) -> Any:
        """A value that all rows must share."""
        rows = self._values.get(name)
        if rows is None:
            return default
        if any(value != rows[0] for value in rows):
            raise InputError(f"input {name} must be the same in every row, got {rows}: split the batch")
        return rows[0]

    def either(self, one: str, other: str, default: Any) -> Any:
        """A value that has two names."""
        if one in self._values and other in self._values:
            raise InputError(f"inputs {one} and {other} mean the same, expected one: drop one of them")
        return self.uniform(one, self.uniform(other, default))

    def flag(self, *names: str) -> bool:
        return any(self.uniform(name, False) for name in names)

    def params(self, row: int) -> dict[str, Any]:
        """Sampling parameters that inputs name directly."""
        found: dict[str, tuple[str, Any]] = {}
        for name, rows in self._values.items():
            param = self._table[name].param
            if not param:
                continue
            if param in found:
                raise InputError(f"inputs {found[param][0]} and {name} mean the same, expected one: drop one of them")
            found[param] = (name, rows[row])
        return {param: value for param, (_, value) in found.items()}


def _table(*fields: Field) -> dict[str, Field]:
    return {entry.name: entry for entry in fields}


_NO_LORA = "LoRA is not served: merge the adapter into the checkpoint and build again"
_NO_PROMPT_TABLE = "prompt tables are not served: send text or token ids"
_NO_GUIDE = "guided decoding is not served: leave it out"
_NO_ENCODER = "encoder-decoder and multimodal models are not served: leave it out"
_NO_BIAS = "logit biases are not served: leave it out"
_NO_LOGITS = "returning logits is not served: use return_log_probs"
_NO_RETENTION = "KV retention hints are not served: leave it out"


def _refused(dtype: str, dims: tuple[int, ...], why: str, *names: str) -> tuple[Field, ...]:
    return tuple(Field(name, dtype, dims, unsupported=why) for name in names)


# What both TensorRT-LLM contracts share under one name.
_TRTLLM_COMMON = (
    Field("end_id", "INT32", low=-1, high=INT32_MAX),
    Field("pad_id", "INT32", low=-1, high=INT32_MAX),
    Field("temperature", "FP32", param="temperature", low=0, high=100),
    Field("min_p", "FP32", param="min_p", low=0, high=1),
    Field("min_tokens", "INT32", param="min_tokens", low=0, high=INT32_MAX),
    Field("min_length", "INT32", param="min_tokens", low=0, high=INT32_MAX),
    Field("seed", "UINT64", param="seed"),
    Field("random_seed", "UINT64", param="seed"),
    Field("num_return_sequences", "INT32", low=1, high=MAX_SEQUENCES),
    Field("exclude_input_in_output", "BOOL"),
    Field("return_log_probs", "BOOL"),
    Field("return_num_input_tokens", "BOOL"),
    Field("return_num_output_tokens", "BOOL"),
    Field("return_perf_metrics", "BOOL"),
    Field("stop", "BOOL"),
    Field("beam_width", "INT32", neutral=(0, 1)),
    Field("repetition_penalty", "FP32", neutral=(1.0,)),
    Field("presence_penalty", "FP32", neutral=(0.0,)),
    Field("frequency_penalty", "FP32", neutral=(0.0,)),
    Field("return_context_logits", "BOOL", neutral=(False,)),
    Field("return_generation_logits", "BOOL", neutral=(False,)),
    *_refused("FP16", (-1, -1), _NO_PROMPT_TABLE, "prompt_embedding_table"),
    *_refused("INT32", (1,), _NO_PROMPT_TABLE, "prompt_vocab_size"),
    *_refused("UINT64", (1,), _NO_LORA, "lora_task_id"),
    *_refused("FP16", (-1, -1), _NO_LORA, "lora_weights"),
    *_refused("INT32", (-1, 3), _NO_LORA, "lora_config"),
    *_refused("STRING", (1,), _NO_GUIDE, "guided_decoding_guide_type", "guided_decoding_guide"),
)

TEXT_INPUTS = _table(
    Field("text_input", "STRING", required=True),
    Field("max_tokens", "INT32", required=True, param="max_tokens", low=1, high=INT32_MAX),
    Field("stream", "BOOL"),
    Field("top_k", "INT32", param="top_k", low=0, high=INT32_MAX),
    Field("top_p", "FP32", low=0, high=1),
    Field("stop_words", "STRING", (-1,), max_bytes=MAX_WORD_BYTES),
    Field("bad_words", "STRING", (-1,), neutral=("",)),
    Field("num_draft_tokens", "INT32", param="num_draft_tokens", low=0, high=1024),
    Field("length_penalty", "FP32", neutral=(0.0, 1.0)),
    Field("use_draft_logits", "BOOL", neutral=(False,)),
    *_TRTLLM_COMMON,
    *_refused("STRING", (1,), _NO_ENCODER, "decoder_text_input", "image_url_input"),
    *_refused("FP16", (-1, 3, -1, -1), _NO_ENCODER, "image_input"),
    *_refused("UINT8", (-1, -1, -1, -1), _NO_ENCODER, "image_bytes_input", "video_bytes_input"),
    *_refused("UINT64", (1,), _NO_PROMPT_TABLE, "prompt_table_extra_id"),
    *_refused("STRING", (-1,), _NO_BIAS, "embedding_bias_words"),
    *_refused("FP32", (-1,), _NO_BIAS, "embedding_bias_weights"),
)

IDS_INPUTS = _table(
    Field("input_ids", "INT32", (-1,), low=0, high=INT32_MAX),
    Field("input_lengths", "INT32", required=True, low=0, high=INT32_MAX),
    Field("request_output_len", "INT32", required=True, param="max_tokens", low=1, high=INT32_MAX),
    Field("streaming", "BOOL"),
    Field("runtime_top_k", "INT32", param="top_k", low=0, high=INT32_MAX),
    Field("runtime_top_p", "FP32", low=0, high=1),
    Field("stop_words_list", "INT32", (2, -1)),
    Field("bad_words_list", "INT32", (2, -1), neutral=(0, -1)),
    Field("len_penalty", "FP32", neutral=(0.0, 1.0)),
    Field("early_stopping", "BOOL", neutral=(False,)),
    Field("beam_search_diversity_rate", "FP32", neutral=(0.0,)),
    Field("runtime_top_p_min", "FP32", neutral=(0.0,)),
    Field("runtime_top_p_decay", "FP32", neutral=(0.0, 1.0)),
    *_refused("INT32", (1,), "top-p decay is not served: leave it out", "runtime_top_p_reset_ids"),
    *_TRTLLM_COMMON,
    *_refused("INT32", (-1,), "the engine's own draft model drafts: leave it out", "draft_input_ids"),
    *_refused("FP32", (-1, -1), "the engine's own draft model drafts: leave it out", "draft_logits"),
    *_refused("FP32", (1,), "SMC never rejects a draft token: leave it out", "draft_acceptance_threshold"),
    *_refused("FP32", (-1,), _NO_BIAS, "embedding_bias"),
    *_refused("INT32", (-1,), _NO_ENCODER, "decoder_input_ids"),
    *_refused("INT32", (1,), _NO_ENCODER, "decoder_input_lengths", "encoder_output_lengths"),
    *_refused("FP16", (-1, -1), _NO_ENCODER, "encoder_input_features"),
    *_refused("BOOL", (-1, -1), _NO_ENCODER, "cross_attention_mask"),
    *_refused("BOOL", (1,), _NO_ENCODER, "skip_cross_attn_blocks"),
    *_refused("FP32", (-1,), _NO_ENCODER, "mrope_rotary_cos_sin"),
    *_refused("INT64", (1,), _NO_ENCODER, "mrope_position_deltas"),
    *_refused("UINT64", (-1,), _NO_PROMPT_TABLE, "prompt_table_extra_ids"),
    *_refused("UINT8", (-1,), "disaggregated serving is not served: leave it out", "context_phase_params"),
    *_refused(
        "INT32",
        (-1,),
        _NO_RETENTION,
        "retention_token_range_starts",
        "retention_token_range_ends",
        "retention_token_range_priorities",
        "retention_token_range_durations_ms",
    ),
    *_refused("INT32", (1,), _NO_RETENTION, "retention_decode_priority", "retention_decode_duration_ms"),
    *_refused(
        "INT32",
        (1,),
        "lookahead decoding is not served: use num_draft_tokens on model smc",
        "lookahead_window_size",
        "lookahead_ngram_size",
        "lookahead_verification_set_size",
    ),
)


def _both(name: str, dtype: str, dims: tuple[int, ...] = (1,), **rules: Any) -> tuple[Field, ...]:
    """A sampling parameter under its plain name and as sampling_param_<name>."""
    return tuple(
        Field(f"{prefix}{name}", dtype, dims, **{"param": name, **rules}) for prefix in ("", "sampling_param_")
    )


SMC_INPUTS = _table(
    Field("text_input", "STRING"),
    Field("input_ids", "INT32", (-1,), low=0, high=INT32_MAX),
    Field("messages", "STRING"),
    Field("stream", "BOOL"),
    Field("streaming", "BOOL"),
    *_both("max_tokens", "INT32", low=1, high=INT32_MAX),
    *_both("min_tokens", "INT32", low=0, high=INT32_MAX),
    *_both("temperature", "FP32", low=0, high=100),
    *_both("top_k", "INT32", low=0, high=INT32_MAX),
    *_both("top_p", "FP32", low=0, high=1),
    *_both("min_p", "FP32", low=0, high=1),
    *_both("seed", "UINT64"),
    *_both("stop_token_ids", "INT32", (-1,), low=0, high=INT32_MAX),
    *_both("ignore_eos", "BOOL"),
    Field("stop_words", "STRING", (-1,), param="stop", max_bytes=MAX_WORD_BYTES),
    Field("sampling_param_stop", "STRING", (-1,), param="stop", max_bytes=MAX_WORD_BYTES),
    Field("n", "INT32", low=1, high=MAX_SEQUENCES),
    Field("sampling_param_n", "INT32", low=1, high=MAX_SEQUENCES),
    Field("mode", "STRING", param="mode", max_bytes=MAX_WORD_BYTES),
    Field("select", "STRING", param="select", max_bytes=MAX_WORD_BYTES),
    Field("num_particles", "INT32", param="num_particles", low=1, high=4096),
    Field("num_draft_tokens", "INT32", param="num_draft_tokens", low=0, high=1024),
    Field("ess_threshold", "FP32", param="ess_threshold", low=0, high=1),
    Field("adapt_draft_tokens", "FP32", param="adapt_draft_tokens", low=0, high=1),
    Field("truncate_rounds", "BOOL", param="truncate_rounds"),
    Field("resampling", "STRING", param="resampling", max_bytes=MAX_WORD_BYTES),
    Field("resample_power", "FP32", param="resample_power", low=0, high=1),
    Field("exact_below", "FP32", param="exact_below", low=0, high=1),
    Field("fallback_below", "FP32", param="fallback_below", low=-1e6, high=0),
    Field("draft_temperature", "FP32", param="draft_temperature", low=0, high=100),
    Field("power_alpha", "FP32", param="power_alpha", low=0, high=100),
    Field("cache_prompt", "BOOL", param="cache_prompt"),
    Field("return_particles", "BOOL", param="return_particles"),
    Field("return_log_probs", "BOOL"),
    Field("return_cumulative_logprob", "BOOL"),
    Field("return_finish_reason", "BOOL"),
    Field("return_stop_reason", "BOOL"),
    Field("return_perf_metrics", "BOOL"),
    Field("sampling_param_return_perf_metrics", "BOOL"),
    Field("exclude_input_in_output", "BOOL"),
    Field("sampling_param_exclude_input_from_output", "BOOL"),
    Field("priority", "INT32", low=-INT32_MAX, high=INT32_MAX),
    Field("timeout_ms", "INT32", low=1, high=INT32_MAX),
    Field("stop", "BOOL"),
    Field("sampling_param_best_of", "INT32", neutral=(1,)),
    Field("sampling_param_frequency_penalty", "FP32", neutral=(0.0,)),
    Field("sampling_param_presence_penalty", "FP32", neutral=(0.0,)),
    *_refused("STRING", (-1,), _NO_ENCODER, "image_url"),
    *_refused("UINT64", (1,), _NO_LORA, "lora_id"),
    *_refused("STRING", (1,), _NO_LORA, "lora_name", "lora_path", "lora_ckpt_source"),
)

_TIMES = tuple(
    Output(name, "INT64", (1,))
    for name in ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
)
_ERRORS = (Output("error_code", "STRING", (1,)), Output("error_message", "STRING", (1,)))
_TRTLLM_OUTPUTS = (
    Output("cum_log_probs", "FP32", (-1,)),
    Output("output_log_probs", "FP32", (-1, -1)),
    Output("batch_index", "INT32", (1,)),
    Output("sequence_index", "INT32", (-1,)),
    Output("num_input_tokens", "INT32", (1,)),
    Output("num_output_tokens", "INT32", (-1,)),
    Output("kv_cache_reused_blocks", "INT32", (-1,)),
    *_TIMES,
    *_ERRORS,
)
TEXT_OUTPUTS = (Output("text_output", "STRING", (-1,)), *_TRTLLM_OUTPUTS)
IDS_OUTPUTS = (Output("output_ids", "INT32", (-1, -1)), Output("sequence_length", "INT32", (-1,)), *_TRTLLM_OUTPUTS)
SMC_OUTPUTS = (
    Output("text_output", "STRING", (-1,)),
    Output("output_ids", "INT32", (-1, -1)),
    Output("sequence_length", "INT32", (-1,)),
    Output("finish_reason", "STRING", (-1,)),
    Output("stop_reason", "STRING", (-1,)),
    Output("cumulative_logprob", "FP32", (-1,)),
    Output("output_log_probs", "FP32", (-1, -1)),
    Output("output_tokens", "STRING", (-1, -1)),
    Output("batch_index", "INT32", (1,)),
    Output("sequence_index", "INT32", (-1,)),
    Output("num_input_tokens", "INT32", (1,)),
    Output("num_output_tokens", "INT32", (-1,)),
    Output("num_cached_tokens", "INT32", (-1,)),
    Output("log_evidence", "FP64", (-1,)),
    Output("log_evidence_sd", "FP64", (-1,)),
    Output("final_ess", "FP64", (-1,)),
    Output("fell_back", "BOOL", (-1,)),
    Output("discarded_rounds", "INT32", (-1,)),
    Output("ess", "FP32", (-1, -1)),
    Output("rounds", "INT32", (-1,)),
    Output("resamples", "INT32", (-1,)),
    Output("recoveries", "INT32", (-1,)),
    Output("seed", "UINT64", (-1,)),
    Output("particles", "STRING", (-1, -1)),
    Output("particle_log_weights", "FP64", (-1, -1)),
    Output("acceptance_rate", "FP32", (-1,)),
    Output("total_accepted_draft_tokens", "INT32", (-1,)),
    Output("total_draft_tokens", "INT32", (-1,)),
    Output("kv_cache_reused_blocks", "INT32", (-1,)),
    *_TIMES,
    *_ERRORS,
)

_LOG_PROBS = {"cum_log_probs", "output_log_probs"}
_PERF = {output.name for output in _TIMES} | {"kv_cache_reused_blocks"}
_SMC_ALWAYS = {
    "finish_reason",
    "stop_reason",
    "num_input_tokens",
    "num_output_tokens",
    "num_cached_tokens",
    "log_evidence",
    "log_evidence_sd",
    "final_ess",
    "fell_back",
    "discarded_rounds",
    "ess",
    "rounds",
    "resamples",
    "recoveries",
    "seed",
    "acceptance_rate",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
}


def _parse_text(row: _Row) -> Parsed:
    def prompt(index: int) -> tuple[dict[str, Any], Any]:
        text = row.get("text_input", index)
        return {"text": text}, text

    def params(index: int) -> tuple[dict[str, Any], list[list[int]]]:
        stop = [word for word in row.get("stop_words", index, []) if word]
        return {**_trtllm_params(row, index, "top_p"), **({"stop": stop} if stop else {})}, []

    return _trtllm_request(row, prompt, params, row.flag("stream"))


def _parse_ids(row: _Row) -> Parsed:
    def prompt(index: int) -> tuple[dict[str, Any], Any]:
        ids, length = row.get("input_ids", index), row.get("input_lengths", index)
        if ids is None:
            raise InputError("input input_ids is missing, expected INT32 of shape [batch, length]: send it")
        if not 1 <= length <= len(ids):
            raise InputError(f"input input_lengths must be in [1, {len(ids)}], got {length} in row {index}: correct it")
        return {"ids": ids[:length]}, ids[:length]

    def params(index: int) -> tuple[dict[str, Any], list[list[int]]]:
        found = _trtllm_params(row, index, "runtime_top_p")
        sequences = _split_word_list("stop_words_list", row.get("stop_words_list", index))
        single = [word[0] for word in sequences if len(word) == 1]
        if single:
            found["stop_token_ids"] = [*found.get("stop_token_ids", []), *single]
        return found, [word for word in sequences if len(word) > 1]

    return _trtllm_request(row, prompt, params, row.flag("streaming"))


def _split_word_list(name: str, value: list[list[int]] | None) -> list[list[int]]:
    """Token sequences of a word list: row 0 the flat tokens, row 1 the end offsets, padded with -1."""
    if value is None:
        return []
    flat, offsets = value
    words, start = [], 0
    for end in offsets:
        if end < 0:
            break
        if not start < end <= len(flat):
            raise InputError(f"input {name} has offsets {offsets}, expected them rising up to {len(flat)}: correct it")
        if end - start > MAX_WORD_TOKENS:
            raise InputError(
                f"input {name} has a word of {end - start} tokens, expected at most {MAX_WORD_TOKENS}: shorten it"
            )
        words.append(flat[start:end])
        start = end
    if any(token < 0 for word in words for token in word):
        raise InputError(f"input {name} has a negative token id within an offset, got {flat}: correct it")
    return words


def _trtllm_params(row: _Row, index: int, top_p_name: str) -> dict[str, Any]:
    params = row.params(index)
    top_p = row.get(top_p_name, index)
    if top_p:  # 0 means "off" to these clients
        params["top_p"] = top_p
    end_id = row.get("end_id", index)
    if end_id is not None:
        params["ignore_eos"] = True
        if end_id >= 0:
            params["stop_token_ids"] = [end_id]
    if row.flag("return_log_probs"):
        params["logprobs"] = True
    return params


def _trtllm_request(
    row: _Row,
    prompt: Callable[[int], tuple[dict[str, Any], Any]],
    params: Callable[[int], tuple[dict[str, Any], list[list[int]]]],
    stream: bool,
) -> Parsed:
    wants = set(_LOG_PROBS if row.flag("return_log_probs") else ())
    wants |= _PERF if row.flag("return_perf_metrics") else set()
    wants |= {name for name in ("num_input_tokens", "num_output_tokens") if row.flag(f"return_{name}")}
    sequences = row.uniform("num_return_sequences", 1)
    return Parsed(
        subs=_subs(row.size, sequences, prompt, params),
        num_sequences=sequences,
        stream=stream,
        echo_prompt=not row.flag("exclude_input_in_output"),
        pad_id=max(row.uniform("pad_id", 0), 0),
        wants=frozenset(wants),
    )


def _parse_smc(row: _Row) -> Parsed:
    def prompt(index: int) -> tuple[dict[str, Any], Any]:
        given = [name for name in ("text_input", "input_ids", "messages") if row.get(name, index) is not None]
        if len(given) != 1:
            raise InputError(
                f"a request needs exactly one of text_input, input_ids and messages, got {given or 'none'}: send one"
            )
        value = row.get(given[0], index)
        if given[0] == "messages":
            return {"messages": _messages(value)}, ""
        return ({"text": value}, value) if given[0] == "text_input" else ({"ids": value}, "")

    def params(index: int) -> tuple[dict[str, Any], list[list[int]]]:
        found = row.params(index)
        if found.get("top_p") == 0:
            found["top_p"] = 1.0
        if "stop" in found:
            found["stop"] = [word for word in found["stop"] if word]
        if row.flag("return_log_probs", "return_cumulative_logprob"):
            found["logprobs"] = True
        return found, []

    wants = set(_SMC_ALWAYS)
    wants |= {"output_log_probs", "output_tokens", "cumulative_logprob"} if row.flag("return_log_probs") else set()
    wants |= {"cumulative_logprob"} if row.flag("return_cumulative_logprob") else set()
    wants |= _PERF if row.flag("return_perf_metrics", "sampling_param_return_perf_metrics") else set()
    wants |= {"particles", "particle_log_weights"} if row.flag("return_particles") else set()
    sequences = row.either("n", "sampling_param_n", 1)
    excluded = row.either("exclude_input_in_output", "sampling_param_exclude_input_from_output", True)
    return Parsed(
        subs=_subs(row.size, sequences, prompt, params),
        num_sequences=sequences,
        stream=row.flag("stream", "streaming"),
        echo_prompt=not excluded,
        wants=frozenset(wants),
        priority=row.uniform("priority", 0),
        timeout_ms=row.uniform("timeout_ms", None),
    )


def _messages(text: str) -> list[dict[str, Any]]:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"input messages must be JSON, got {text[:60]!r} ({error}): send a list of messages") from None
    ok = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not ok:
        raise InputError(f"input messages must be a non-empty JSON list of objects, got {text[:60]!r}: send one")
    if _nesting(messages) > MAX_NESTING:
        raise InputError(f"input messages is nested too deeply, expected at most {MAX_NESTING} levels: flatten it")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which is no text
        raise InputError(
            f"input messages must be Unicode text, got {error.object[error.start]!r} at {error.start}: send whole characters"
        ) from None
    return messages


def _nesting(value: Any) -> int:
    """Levels of lists and objects, counted without recursion."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, (list, dict))]:
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _subs(
    rows: int,
    sequences: int,
    prompt: Callable[[int], tuple[dict[str, Any], Any]],
    params: Callable[[int], tuple[dict[str, Any], list[list[int]]]],
) -> tuple[SubRequest, ...]:
    subs = []
    for row in range(rows):
        text, echo = prompt(row)
        chosen, stop_sequences = params(row)
        for sequence in range(sequences):
            own = dict(chosen)
            if "seed" in own:
                own["seed"] = (own["seed"] + sequence) % 2**64
            subs.append(SubRequest(row, sequence, text, echo, own, stop_sequences))
    return tuple(subs)


TEXT = Contract(TEXT_INPUTS, TEXT_OUTPUTS, "text_output", _parse_text)
IDS = Contract(IDS_INPUTS, IDS_OUTPUTS, "output_ids", _parse_ids)
SMC = Contract(SMC_INPUTS, SMC_OUTPUTS, "text_output", _parse_smc)

CONTRACTS = {"smc": SMC, "ensemble": TEXT, "tensorrt_llm_bls": TEXT, "tensorrt_llm": IDS}


def config_pbtxt(model: str) -> str:
    """Write a model's config.pbtxt from its contract."""
    contract = CONTRACTS[model]

    def tensor(name: str, dtype: str, dims: tuple[int, ...], optional: bool) -> str:
        shape = ", ".join(str(size) for size in dims)
        extra = " optional: true" if optional else ""
        return f'  {{ name: "{name}" data_type: TYPE_{dtype} dims: [ {shape} ]{extra} }}'

    inputs = ",\n".join(tensor(f.name, f.dtype, f.dims, not f.required) for f in contract.inputs.values())
    outputs = ",\n".join(tensor(o.name, o.dtype, o.dims, False) for o in contract.outputs)
    return (
        f'name: "{model}"\nbackend: "python"\nmax_batch_size: {MAX_BATCH_SIZE}\n'
        "model_transaction_policy { decoupled: true }\n"
        f"input [\n{inputs}\n]\noutput [\n{outputs}\n]\n"
        "instance_group [ { kind: KIND_CPU count: 1 } ]\n"
    )
