"""Tests of the guide: promised commands, real defaults, and equal content in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from experiments.recipe.config import TRAIN_SAMPLES, VAL_SAMPLES, RecipeSettings
from kvcore.flags import flags_of
from tests.support.guide import CHINESE_PAGE, PAGE, blocks
from tests.support.servers import REPOSITORY
from tests.support.tiny_models import build_model, tiny_spec

PAGES = (PAGE, CHINESE_PAGE)
# Commands that users already have; each must be in a block of the page, unchanged.
PROMISED = (
    """from data.multi_task_dataset import MultiTaskReasoningDataset
loader = MultiTaskReasoningDataset(base_datasets=['gsm8k', 'svamp', 'strategyqa'], extended_datasets=['math', 'arc_challenge', 'hotpotqa'],
    use_extended=True, math23k_ratio=0.2, train_samples=15000, val_samples=2000)
train_ds, val_ds = loader.load_and_prepare()
train_ds.save_to_disk('./data/prepared/train'); val_ds.save_to_disk('./data/prepared/val')
""",  # noqa: E501
    """python scripts/extract_dual_style_kv.py --teacher_models "Qwen/Qwen2.5-7B" "Qwen/Qwen2.5-14B" --student_model "Qwen/Qwen2.5-1.5B" \\
    --dataset_path "./data/prepared/train" --output_dir "./kv_cache/qwen_dual_teacher" --output_name "train_kv" --kv_compression "right" --max_length 2048 --device cuda
""",  # noqa: E501
    """python -c "import torch; kv_data = torch.load('./kv_cache/qwen_dual_teacher/train_kv.pt'); print(len(kv_data)); print(kv_data[0]['teacher_kvs'][0]['keys'].shape)"
""",  # noqa: E501
    """sbatch --job-name="qwen_dual" --export=STUDENT="Qwen/Qwen2.5-1.5B",TEACHERS="Qwen/Qwen2.5-7B Qwen/Qwen2.5-14B" scripts/run_three_stage_routing.sh
""",  # noqa: E501
    "sbatch scripts/run_large_scale_multi_teacher.sh\n",
    """python evaluation/multi_task_eval.py --model_path "./outputs/three_stage_routing/stage3_learnable/best_model" \\
    --eval_datasets gsm8k_test math500 bbh gpqa truthfulqa cmmlu_subset ceval_subset --output_file "./outputs/three_stage_routing/stage3_learnable/eval_results.json"
""",  # noqa: E501
    "python experiments/train_multi_teacher_kv.py --load_in_8bit true --bnb_4bit_compute_dtype bfloat16 ",
    "tensorboard --logdir outputs/three_stage_routing/stage2_similarity\n",
)
# Words for a default of None or an empty default.
WORDS_FOR_EMPTY = {"required", "all", "none", "equal", "its own"}
# Defaults that depend on another flag: the value without that flag.
DEPENDENT_DEFAULTS = {
    "--fusion_strategy": "fixed",
    "--train_samples": str(TRAIN_SAMPLES),
    "--val_samples": str(VAL_SAMPLES),
}


@pytest.mark.parametrize("command", PROMISED)
def test_promised_commands_are_in_the_guide_unchanged(command: str) -> None:
    assert [block.text for block in blocks(PAGE) if block.text.startswith(command)]


def test_both_languages_have_the_same_code_blocks() -> None:
    english, chinese = map(blocks, PAGES)
    assert len(english) > 10
    assert english == chinese


def test_both_languages_have_the_same_sections_tables_and_names() -> None:
    english, chinese = map(outline, PAGES)
    assert english == chinese


def outline(page: Path) -> dict[str, list[str]]:
    """Heading numbers, table shapes, sorted inline code and links to pages: equal in all languages."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {
        "headings": re.findall(r"^(#+(?: \d+)?) ", text, re.MULTILINE),
        "rows": [f"{line.count('|')} {' '.join(re.findall('`[^`]+`', line))}" for line in rows],
        "names": sorted(re.findall(r"`[^`]+`", text)),
        "links": sorted(set(re.findall(r"\]\(([a-z]+\.md)\)", text)) - {"guide.md"}),
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_within_a_page_point_to_a_heading(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) - anchors == set()


def test_flag_tables_match_the_flags_and_defaults_of_the_command() -> None:
    known = {
        flag.replace("-", "_"): field
        for name, field in RecipeSettings.model_fields.items()
        for flag in flags_of(name, field)
    }
    shown = table_rows(r"^\| (`--.*?) \| (.*?) \|")
    for flags, default in shown:
        for flag in re.findall(r"--\w+", flags):
            field = known[flag.replace("-", "_")]
            assert stated(default) == actual(field.get_default(), required=field.is_required(), flag=flag)
    assert len(shown) == 41


def test_the_line_for_a_cache_of_transformers_5_works() -> None:
    line = "outputs.past_key_values.layers[0].keys"
    assert all(f"`{line}`" in page.read_text(encoding="utf-8") for page in PAGES)
    outputs = build_model(tiny_spec("qwen2"))(torch.tensor([[3, 4, 5]]), use_cache=True)
    assert eval(line).shape == (1, 2, 3, 16)
    with pytest.raises(TypeError, match="'DynamicCache' object is not subscriptable"):
        _ = outputs.past_key_values[0][0]


def stated(cell: str) -> str:
    return "" if cell in WORDS_FOR_EMPTY - {"required"} else cell.strip("`")


def actual(default: object, *, required: bool, flag: str) -> str:
    if required:
        return "required"
    if default is None:
        return DEPENDENT_DEFAULTS.get(flag, "")
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return " ".join(default)
    return str(default)


@pytest.mark.parametrize(
    ("script", "column"), [("run_three_stage_routing.sh", 1), ("run_large_scale_multi_teacher.sh", 2)]
)
def test_variable_tables_match_the_defaults_of_the_scripts(script: str, column: int) -> None:
    text = (REPOSITORY / "scripts" / script).read_text(encoding="utf-8")
    # A variable may have two defaults. The first applies if no teachers are named.
    set_here: dict[str, str] = {}
    for name, value in re.findall(r'^ *default (\w+) "(.*?)"', text, re.MULTILINE):
        set_here.setdefault(name, re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value))
    for row in table_rows(r"^\| (`[A-Z]\w+`.*?) \| (.*?) \| (.*?) \| .*\|$"):
        names = re.findall(r"`(\w+)`", row[0])
        if names[0] == "HF_HOME":
            continue
        shown = "" if row[column] in WORDS_FOR_EMPTY | {"all three"} else row[column].strip("`")
        assert shown == next(set_here[name] for name in names if name in set_here), names


def table_rows(pattern: str) -> list[tuple[str, ...]]:
    return re.findall(pattern, PAGE.read_text(encoding="utf-8"), re.MULTILINE)
