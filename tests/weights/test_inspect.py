"""A report names every kind of weights, reads no tensor, and tells everything that an import would stop at."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.weights import hub as small
from tests.weights import run
from vflax.templates import chat_template
from vflax.weights import hf_images, hub, llava_config, names, safetensors_io, torch_files, workdir_source
from vflax.weights.facts import OWN_JINJA, Facts, look
from vflax.weights.inspect import main
from vflax.weights.kinds import ADAPTER, CLIP, DECODER, HF, ORIGINAL, PROJECTOR, WORKDIR
from vflax.weights.open import join
from vflax.weights.safetensors_io import TensorSpec, write_shards

CONFIG = small.with_decoder(small.CONFIG, vocab_size=384)
TENSORS = {name: tensor.astype(np.float16) for name, tensor in small.tensors_of(CONFIG).items()}
COUNTS = {
    part: sum(
        math.prod(shape) for name, shape in names.expected(CONFIG).items() if names.part_of(name) == part
    )
    for part in ("vision", "bridge", "decoder")
}
BRIDGE = {name: tensor for name, tensor in TENSORS.items() if names.part_of(name) == "bridge"}
BASE = "org/base"


def write(folder: Path, stem: str, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    write_shards(folder, stem, specs, 1 << 40, lambda name, index: tensors[name][index])


def write_hf(folder: Path, tensors: dict[str, np.ndarray] = TENSORS) -> None:
    small.write_llava(folder, CONFIG, tensors, max_bytes=30_000)
    small.write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(chat_template("vicuna_v1", "front"))


def write_original(folder: Path, tower: str, with_tower: bool) -> None:
    kept = {name: t for name, t in TENSORS.items() if with_tower or names.part_of(name) != "vision"}
    write(folder, "model", {names.original(name, "mlp2x_gelu"): t for name, t in kept.items()})
    raw = llava_config.to_original(CONFIG, small.RULES, tower, {}, "float16")
    if with_tower:
        small.dump(folder / "preprocessor_config.json", hf_images.to_preprocessor(small.RULES))
    else:
        del raw["vision_config"]
    small.dump(folder / "config.json", raw)
    small.write_tokenizer(folder)


def write_adapter(folder: Path, base: str, width: int = 42) -> None:
    """LoRA of rank 4 on two projections of three layers, and a whole projector."""
    tensors = {f"base_model.model.model.{name}": tensor for name, tensor in BRIDGE.items()}
    for layer in range(3):
        for module, out in (("q_proj", 60), ("v_proj", 20)):
            name = f"base_model.model.model.language_model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = np.ones((4, width), np.float16)
            tensors[f"{name}.lora_B.weight"] = np.ones((out, 4), np.float16)
    write(folder, "adapter_model", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base}
    small.dump(folder / "adapter_config.json", config)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """One of each kind."""
    root = tmp_path_factory.mktemp("weights")
    write_hf(root / HF)
    small.write_clip(root / CLIP, CONFIG, TENSORS, "vision_model.")
    small.write_decoder(root / DECODER, CONFIG, TENSORS)
    small.write_tokenizer(root / DECODER)
    write_original(root / ORIGINAL, "org/tower", True)
    write_adapter(root / ADAPTER, str(root / HF))
    write(root / PROJECTOR, "mm_projector", {names.original(n, "mlp2x_gelu"): t for n, t in BRIDGE.items()})
    source = join(CONFIG, root / CLIP, root / DECODER, None, 0)
    trained = [path for path in names.table(CONFIG) if path.startswith("bridge/")]
    run.write(root / WORKDIR, source, CONFIG, trained, "plain", (3, 7))
    return {kind: root / kind for kind in (WORKDIR, HF, ORIGINAL, ADAPTER, CLIP, DECODER, PROJECTOR)}


def report(capsys, *args: str) -> tuple[int, str]:
    """Exit status and what is printed, with any run of white space as one space."""
    status = main(args)
    return status, " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", [WORKDIR, HF, ORIGINAL, ADAPTER, CLIP, DECODER, PROJECTOR])
def test_each_kind_is_named_as_what_it_is_and_nothing_but_headers_is_read(
    places: dict[str, Path], kind: str, monkeypatch, capsys
) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("a tensor is read, or torch is wanted")

    monkeypatch.setattr(safetensors_io, "read_part", fail)
    monkeypatch.setattr(torch_files, "_torch", fail)
    monkeypatch.setattr(workdir_source._Leaves, "read", fail)
    status, said = report(capsys, str(places[kind]))
    assert status == 0, said
    assert f"{places[kind]} {kind}" in said and "no problems found" in said


def test_parameters_are_counted_by_part(places: dict[str, Path]) -> None:
    whole = {kind: look(places[kind]) for kind in (WORKDIR, HF, ORIGINAL)}
    for facts in whole.values():
        assert {name: part.parameters for name, part in facts.parts.items()} == COUNTS
    assert whole[HF].parts["vision"].bytes == 2 * COUNTS["vision"]
    assert whole[HF].parts["decoder"].dtypes == {"float16": 30}
    assert whole[WORKDIR].parts["bridge"].dtypes == {"float32": 4}
    shards = list(places[HF].glob("*.safetensors"))
    assert (whole[HF].files, whole[HF].bytes) == (len(shards), sum(path.stat().st_size for path in shards))


def test_what_a_clip_or_a_decoder_holds_beside_the_model_is_counted_as_other(places: dict[str, Path]) -> None:
    assert look(places[CLIP]).parts["other"].tensors == 5
    assert look(places[DECODER]).parts["other"].parameters == 5


NAMINGS = {
    "4.x hub": ("vision_tower.vision_model.", "language_model.model."),
    "4.52 module": ("model.vision_tower.vision_model.", "model.language_model."),
    "5.x module": ("model.vision_tower.", "model.language_model."),
    "5.x saved": ("vision_tower.", "language_model.model."),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_naming_of_a_hugging_face_llava_is_told(tmp_path: Path, naming: str) -> None:
    tower, words = NAMINGS[naming]
    renamed = {
        name.replace("vision_tower.vision_model.", tower).replace("language_model.model.", words): tensor
        for name, tensor in TENSORS.items()
    }
    write_hf(tmp_path, renamed)
    facts = look(tmp_path)
    assert (facts.naming, facts.problems) == (naming, [])


def test_the_models_numbers_are_those_of_its_config(places: dict[str, Path], capsys) -> None:
    for kind in (WORKDIR, HF, ORIGINAL, ADAPTER):
        model = look(places[kind]).model
        assert (model["vision"]["tokens_per_image"], model["vision"]["feature_layer"]) == (36, -2)
        assert (model["bridge"]["kind"], model["decoder"]["rope_theta"]) == ("mlp2x_gelu", 700.0)
    said = report(capsys, str(places[HF]))[1]
    for words in (
        "CLIP: 4 layers, 32 wide, 4 heads", "30 px in patches of 5: 36 tokens per image, from layer -2",
        "mlp2x_gelu, 32 -> 42", "3 layers, 42 wide, 6 heads and 2 kv heads of 10", "vocabulary 384",
        "not tied", "rope theta 700, no scaling", "tokenizer.model, vocabulary 360, BOS first",
        "vicuna_v1, images in front", "padded to a square, 30 x 30 px",
    ):  # fmt: skip
        assert words in said, words
    assert look(places[PROJECTOR]).model == {
        "bridge": {"kind": "mlp2x_gelu", "in_width": 32, "out_width": 42}
    }


def test_a_step_of_a_workdir_is_chosen_and_told(places: dict[str, Path], capsys) -> None:
    assert "step 7" in report(capsys, str(places[WORKDIR]))[1]
    assert "step 3" in report(capsys, str(places[WORKDIR]), "--step=3")[1]
    status, said = report(capsys, str(places[WORKDIR]), "--step=5")
    assert status == 1 and "holds the steps 3, 7" in said and "vocabulary 384" in said


def test_the_template_is_vflaxs_its_own_or_none(tmp_path: Path) -> None:
    write_hf(tmp_path)
    assert (look(tmp_path).template, look(tmp_path).position) == ("vicuna_v1", "front")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert (look(tmp_path).template, look(tmp_path).position) == (OWN_JINJA, None)
    (tmp_path / "chat_template.jinja").unlink()
    facts = look(tmp_path)
    assert facts.template is None and "--template" in facts.notes[0] and not facts.problems


def test_an_adapter_tells_its_rank_its_base_and_what_it_changes(places: dict[str, Path], capsys) -> None:
    facts = look(places[ADAPTER]).adapter
    assert facts is not None and facts["replaces"] == list(BRIDGE)
    assert (facts["rank"], facts["alpha"], facts["scaling"], facts["base"]) == (
        [4], 8, 2.0, str(places[HF])
    )  # fmt: skip
    assert facts["changes"] == {"q_proj": 3, "v_proj": 3}
    said = report(capsys, str(places[ADAPTER]))[1]
    assert "rank 4, alpha 8: scaled by 2" in said and "replaces multi_modal_projector (4)" in said


def snapshot(root: Path) -> Path:
    return root / "models--org--base" / "snapshots" / "c0ffee"


@pytest.mark.parametrize(("width", "problems"), [(42, 0), (40, 1)])
def test_of_a_base_on_the_hub_the_config_is_fetched_and_the_adapter_held_against_it(
    tmp_path: Path, monkeypatch, width: int, problems: int
) -> None:
    write_hf(snapshot(tmp_path))
    for path in snapshot(tmp_path).glob("*.safetensors*"):
        path.unlink()
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda hub_id, **options: asked.append(options) or snapshot(tmp_path))
    write_adapter(tmp_path / "lora", BASE, width)
    facts = look(tmp_path / "lora")
    assert asked and not any(options["weights"] for options in asked)
    assert facts.notes == ["org/base@c0ffee: its weights were not fetched, nor looked at"]
    assert len(facts.problems) == problems, facts.problems
    assert all("the adapter belongs to another base" in problem for problem in facts.problems)


def test_a_hub_id_is_fetched_and_its_commit_told(tmp_path: Path, monkeypatch, capsys) -> None:
    write_hf(snapshot(tmp_path))
    monkeypatch.setattr(
        hub, "fetch", lambda hub_id, **options: snapshot(tmp_path) if options["weights"] else None
    )
    status, said = report(capsys, BASE)
    assert status == 0 and "from org/base@c0ffee" in said


def test_missing_tensors_and_a_missing_tokenizer_are_listed_and_the_status_is_1(
    tmp_path: Path, capsys
) -> None:
    tensors = TENSORS | {"image_newline": np.ones(42, np.float16)}
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    tensors["multi_modal_projector.linear_1.bias"] = np.ones(41, np.float16)
    small.write_llava(tmp_path, CONFIG, tensors)
    status, said = report(capsys, str(tmp_path))
    assert status == 1
    for words in (
        "tensors missing: 1 - language_model.model.layers.1.mlp.up_proj.weight [52, 42]",
        "tensors of another shape: 1 - multi_modal_projector.linear_1.bias is [41], the config asks for [42]",
        "tensors unexpected: 1 - image_newline in",
        "the tensors do not fit the config: 1 missing, 1 of another shape, 1 unexpected",
        "neither tokenizer.model nor tokenizer.json",
    ):
        assert words in said, words


def test_everything_that_is_wrong_is_told_and_each_of_it_once(tmp_path: Path) -> None:
    write_hf(tmp_path)
    small.edit(tmp_path / "config.json", projector_hidden_act="relu", image_token_index=357)
    (tmp_path / "preprocessor_config.json").unlink()
    sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    told = "\n".join(look(tmp_path).problems)
    for words in ("projector_hidden_act='relu'", "image_token_index is 357", "preprocessor_config.json: not there",
                  "model-00001-of-"):  # fmt: skip
        assert told.count(words) == 1, told


def test_a_dtype_that_vflax_does_not_read_is_a_problem(tmp_path: Path) -> None:
    write_hf(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"F16"', b'"F8_"'))
    facts = look(tmp_path)
    assert [p for p in facts.problems if "has dtype F8_" in p and f"{len(TENSORS) - 1} more tensors" in p]
    assert {name: part.parameters for name, part in facts.parts.items()} == COUNTS


@pytest.mark.parametrize("there", [True, False])
def test_a_tower_that_lies_elsewhere_is_compared_where_it_is_and_a_problem_where_it_is_not(
    places: dict[str, Path], tmp_path: Path, there: bool
) -> None:
    tower = str(places[CLIP]) if there else "/nowhere/clip"
    write_original(tmp_path, tower, False)
    facts = look(tmp_path)
    assert (facts.kind, facts.tower, "vision" in facts.parts) == (ORIGINAL, tower, False)
    assert ("vision" in facts.model, not facts.problems) == (there, there)
    assert facts.model["decoder"]["vocab_size"] == 384 and not facts.misfit
    assert any("mm_vision_tower is /nowhere/clip" in problem for problem in facts.problems) != there
    assert not look(tmp_path, vision=places[CLIP]).problems


def test_a_projector_that_is_there_twice_is_told_from_its_safetensors(
    places: dict[str, Path], tmp_path: Path, capsys
) -> None:
    file = places[PROJECTOR] / "mm_projector.safetensors"
    (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "mm_projector.bin").write_bytes(b"not looked at")
    status, said = report(capsys, str(tmp_path))
    assert status == 0 and PROJECTOR in said
    assert look(tmp_path / file.name).parts == look(tmp_path).parts and not look(file).problems


def test_json_is_one_object_equal_to_the_facts(places: dict[str, Path], capsys) -> None:
    for place in places.values():
        facts: Facts = look(place)
        assert main([str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == facts.to_dict()


def test_a_folder_that_is_nothing_known_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for place, words in ((tmp_path, "model_type='bert'"), (tmp_path / "none", "not there")):
        assert main([str(place)]) == 1
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and err.startswith("inspect: ") and words in err


def test_nothing_is_wider_than_the_terminal(places: dict[str, Path], monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(places[HF].parent)
    main([HF])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60
