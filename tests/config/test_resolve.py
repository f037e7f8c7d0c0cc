"""Where settings come from."""

import pytest
import yaml

from lorafit.config import RunConfig, load_recipe, parse_assignments, parse_bytes, resolve
from lorafit.errors import UsageError


def test_the_defaults_are_the_recipe_as_its_author_meant_it():
    config = RunConfig()
    recipe = {
        "rank": 16,
        "alpha": 32,
        "dropout": 0.05,
        "targets": "qv",
        "quantization": "nf4",
        "lr": 2e-4,
        "schedule": "cosine",
        "warmup": 0.05,
        "weight_decay": 0.01,
        "epochs": 3,
        "examples_per_step": 16,
        "compute": "auto",
    }
    assert {key: getattr(config, key) for key in recipe} == recipe


def test_a_flag_beats_the_recipe_which_beats_the_default_and_each_is_named():
    resolved = resolve({"rank": 4, "lr": 1e-3}, {"lr": 5e-4, "epochs": None})
    assert (resolved.config.rank, resolved.config.lr, resolved.config.epochs) == (4, 5e-4, 3)
    assert [resolved.sources[key] for key in ("rank", "lr", "epochs")] == ["recipe", "flag", "default"]


def test_alpha_follows_a_rank_that_was_set_without_it():
    resolved = resolve(flags={"rank": 8})
    assert resolved.config.alpha == 16
    assert resolved.sources["alpha"] == "flag"
    assert resolve(flags={"rank": 8, "alpha": 8}).config.alpha == 8


def test_the_plan_fills_only_what_nobody_set():
    planned = resolve(flags={"rank": 64}).planned({"rank": 8, "quantization": "none"})
    assert (planned.config.rank, planned.config.quantization) == (64, "none")
    assert (planned.sources["rank"], planned.sources["quantization"]) == ("flag", "plan")


def test_the_plan_may_not_decide_what_is_the_users():
    with pytest.raises(AssertionError):
        resolve().planned({"epochs": 1.0})


def test_an_unknown_setting_is_an_error_with_the_nearest_name():
    with pytest.raises(UsageError, match=r"unknown setting 'epoch' in flags; did you mean 'epochs'"):
        resolve(flags={"epoch": 2})
    with pytest.raises(UsageError, match=r"unknown setting 'dropot' in the recipe; did you mean 'dropout'"):
        resolve({"dropot": 0.1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", "many"),
        ("dropout", 1.5),
        ("lr", float("nan")),
        ("alpha", float("inf")),
        ("compute", "int3"),
        ("gpu_memory", "8 bananas"),
        ("epochs", -1),
        ("seed", -1),
        ("targets", 7),
        ("rank", True),
        ("lr", True),
        ("gpu_memory", "8"),
    ],
)
def test_a_value_that_does_not_fit_is_one_sentence_naming_its_key(key, value):
    with pytest.raises(UsageError) as caught:
        resolve(flags={key: value})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_has_a_source_and_a_description():
    table = resolve().table()
    assert [key for key, _, _ in table] == list(RunConfig.model_fields)
    assert all(field.description for field in RunConfig.model_fields.values())
    assert len(table) < 60


def test_assignments_read_numbers_lists_and_words():
    given = parse_assignments(["lr=2e-4", "targets=[q_proj, k_proj]", "seed=7", "compute=bf16", "eval_steps=null"])
    assert given == {"lr": 2e-4, "targets": ["q_proj", "k_proj"], "seed": 7, "compute": "bf16", "eval_steps": None}


@pytest.mark.parametrize("text", ["rank", "=8", ""])
def test_an_assignment_without_key_or_equals_is_a_usage_error(text):
    with pytest.raises(UsageError, match="key=value"):
        parse_assignments([text])


@pytest.mark.parametrize(
    "content", ["rank: [", "- a\n- b", "3", "\xff\xfe".encode("latin-1").decode("latin-1") + ": : :"]
)
def test_a_recipe_that_is_no_mapping_is_a_usage_error(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match="recipe"):
        load_recipe(path)


def test_a_missing_recipe_says_so(tmp_path):
    with pytest.raises(UsageError, match="cannot read the recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("24 GB", 24 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "eight", "-8GiB", "0GiB", "8XiB", "8iB"])
def test_what_is_no_size_is_a_usage_error(text):
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes(text)


def test_every_setting_is_read_somewhere():
    """A flag that nothing reads is a lie to whoever sets it."""
    from pathlib import Path

    source = Path(__file__).parents[2] / "src" / "lorafit"
    text = "\n".join(path.read_text() for path in source.rglob("*.py") if path.name != "run_config.py")
    unread = [key for key in RunConfig.model_fields if f".{key}" not in text]
    assert not unread, f"nothing reads {unread}"


def test_every_recipe_in_the_project_parses():
    from pathlib import Path

    root = Path(__file__).parents[2]
    recipes = [*root.glob("recipes/*.yaml"), root / "src/lorafit/demo/recipe.yaml"]
    assert len(recipes) > 1
    for path in recipes:
        assert resolve(yaml.safe_load(path.read_text())).config.rank > 0


def test_on_and_off_mean_what_they_say_although_yaml_reads_booleans(tmp_path):
    assert resolve(flags=parse_assignments(["compile=on"])).config.compile == "on"
    (tmp_path / "recipe.yaml").write_text("compile: off\n")
    assert resolve(load_recipe(tmp_path / "recipe.yaml")).config.compile == "off"


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("out=2026-13-45", "2026-13-45"),
        ("base=2024-02-31", "2024-02-31"),
        ("holdout=2026-02-31", "2026-02-31"),
        ("revision=12345678", "12345678"),
        ("revision=0123", "0123"),
        ("revision=1e5", "1e5"),
        ("data=r*.jsonl", "r*.jsonl"),
        ("gpu=4090", "4090"),
        ("revision=null", None),
        ("base='quoted'", "quoted"),
    ],
)
def test_text_in_an_assignment_stays_the_text_it_is(assignment, value):
    assert list(parse_assignments([assignment]).values()) == [value]
    resolve(flags=parse_assignments([assignment]))


def test_text_in_a_recipe_stays_the_text_it_is(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("base: 2020-01-01\nrevision: 0123\ndata: [2024, 2026-13-45]\nmap: {response: 3}\nrank: 8\n")
    config = resolve(load_recipe(path)).config
    assert (config.base, config.revision, config.data) == ("2020-01-01", "0123", ("2024", "2026-13-45"))
    assert (config.field_map, config.rank) == ({"response": "3"}, 8)


@pytest.mark.parametrize("digits", [400, 5000])
def test_an_endless_number_is_one_sentence(tmp_path, digits):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"rank: 8\nseed: {'9' * digits}\n")
    with pytest.raises(UsageError, match=r"recipe.yaml:2:7: .*not a number"):
        load_recipe(path)
    with pytest.raises(UsageError, match=r"--set lr: '9+' is not a value") as caught:
        parse_assignments([f"lr={'9' * digits}"])
    assert len(str(caught.value)) < 200


def test_a_scale_that_no_adapter_may_have_is_refused_before_training():
    assert resolve(flags={"alpha": 16384}).config.alpha == 16384
    with pytest.raises(
        UsageError, match=r"alpha: alpha / rank is 2048, and adapters load with at most 1024.*set alpha to 8192 or less"
    ):
        resolve(flags={"alpha": 16384, "rank": 8})


@pytest.mark.parametrize("text", ["8", "8b", "1000000"])
def test_a_bare_small_number_is_asked_for_its_unit(text):
    with pytest.raises(UsageError, match="has no unit"):
        parse_bytes(text)
    assert parse_bytes(str(8 << 30)) == 8 << 30


def test_an_absurd_size_is_a_usage_error():
    with pytest.raises(UsageError, match="not a size"):
        parse_bytes("9" * 400 + "GiB")


def test_what_begins_no_code_of_a_finding_is_refused():
    assert resolve(flags={"ignore": "D04, P,S001"}).config.ignore == ("D04", "P", "S001")
    for wrong in ("ZZ", "d044", "D04x", "D0445", "044", "D99", "P99"):
        with pytest.raises(UsageError, match=f"no finding's code starts with '{wrong}'"):
            resolve(flags={"select": wrong})


def test_a_share_may_be_written_per_cent():
    assert resolve(flags={"holdout": "10%"}).config.holdout == 0.1
    assert resolve(flags=parse_assignments(["holdout=2.5 %"])).config.holdout == 0.025


def test_all_unknown_keys_and_all_values_that_do_not_fit_are_one_error():
    with pytest.raises(UsageError) as caught:
        resolve({"learningrate": 1, "nosuch": 2, "rank": 0, "dropout": 7})
    said = str(caught.value)
    assert said.startswith("4 settings are invalid")
    for words in ("  learningrate: did you mean 'lr'?", "  nosuch: ", "rank: 0", "dropout: 7"):
        assert words in said
