"""README.md of an export: what the files are, how to load them, and the numbers that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.schema import ModelConfig, QuantConfig

if TYPE_CHECKING:
    from quant.export import ExportSummary

INT4_TEXT = """\
The routed experts are stored as INT4: {group} consecutive inputs share one bf16 scale, and every weight is
`bf16(code * scale)`. {origin} Everything else is stored in {dtype}. Format: compressed-tensors `pack-quantized`.
"""

TRAINED = (
    "These are the values that the forward pass of quantisation-aware training uses, so serving the directory in bf16 "
    "arithmetic changes no weight."
)
ROUNDED = "Training did not see these values: its weights were rounded afterwards."

USE_TEXT = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIRECTORY", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

transformers unpacks INT4 experts to bf16 when it loads them; vLLM and SGLang keep four bits. `evidence.json` holds a
SHA-256 of every tensor: `launch.py verify DIRECTORY` checks the directory against it.
"""


def model_card(model: ModelConfig, quant: QuantConfig, summary: ExportSummary, report: Mapping[str, Any], rounded: bool) -> str:
    """Markdown text; `report` rows become a table. rounded: training did not see the experts on the grid."""
    served = "INT4 experts" if quant.grid != "none" else model.dtype
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n",
        f"# A mixture-of-experts model, {served}\n",
        f"A DeepSeek-V3-family mixture-of-experts model: {model.num_hidden_layers} layers, "
        f"{model.n_routed_experts} routed experts of which {model.num_experts_per_tok} serve a token, "
        f"{summary.weights:,} weights, {summary.quantized_weights:,} of them on the INT4 grid "
        f"({summary.bits_per_weight:.2f} bits per weight over all).\n",
    ]
    if quant.grid != "none":
        parts.append(INT4_TEXT.format(group=quant.group_size, dtype=model.dtype, origin=ROUNDED if rounded else TRAINED))
    if report:
        rows = "\n".join(
            f"| {label} | {value:.4g} |" if isinstance(value, float) else f"| {label} | {value} |"
            for label, value in report.items()
        )
        parts.append(f"## Measured\n\n| | |\n|---|---|\n{rows}\n")
    return "\n".join([*parts, USE_TEXT])
