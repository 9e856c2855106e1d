"""The README.md of an exported model: what it is made of and what was done to it."""

from collections.abc import Sequence

import yaml


def model_card(
    *,
    base: str,
    num_experts: int,
    num_frozen: int,
    topk: int,
    original_languages: Sequence[str] = (),
    expanded_languages: Sequence[str] = (),
    trained: bool = True,
) -> str:
    """Markdown with the YAML header that model hubs read; `num_experts` = 0 describes a dense model."""
    languages = [*original_languages, *expanded_languages]
    header = {"base_model": base, "library_name": "transformers", "tags": ["megatron_lpr"]}
    if languages:
        header["language"] = languages
    if num_experts:
        header["tags"].append("moe")
        made_of = (
            f"Every feed-forward network of `{base}` became {num_experts} experts with top-{topk} routing "
            f"(MoE-LPR, arXiv 2408.11396). Experts 0 to {num_frozen - 1} are the original one and were never "
            f"trained, nor were attention, embeddings and norms. "
        )
        made_of += (
            f"The {num_experts - num_frozen} new experts and the router were post-trained."
            if trained
            else "The new experts are copies of it and the router is random: the function is the base's."
        )
    else:
        made_of = f"`{base}`, post-trained as a dense model."
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, expanded",
        "",
        made_of,
    ]
    if original_languages:
        lines += ["", f"Languages it already spoke: {', '.join(original_languages)}."]
    if expanded_languages:
        lines += ["", f"Languages it was expanded to: {', '.join(expanded_languages)}."]
    return "\n".join([*lines, "", "Exported by megatron_lpr.", ""])
