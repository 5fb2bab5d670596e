import pytest
import torch

from dino_hf import DinoDetrForObjectDetection
from dino_hf.model.encoder import DinoDetrEncoder, DinoDetrEncoderLayer
from dino_hf.model.feature_levels import cell_centers
from dino_hf.model.position_embedding import embed_map
from helpers import num_tokens, randomize, tiny_config, tiny_images, tiny_labels, tiny_levels

LEVELS = tiny_levels()


def tiny_encoder(**changes) -> DinoDetrEncoder:
    return randomize(DinoDetrEncoder(tiny_config(num_feature_levels=3, **changes)), scale=0.1).eval()


def random_tokens() -> torch.Tensor:
    return torch.randn(2, num_tokens(LEVELS), 64)


def test_a_layer_adds_attention_and_feed_forward_and_norms_behind_each():
    layer = randomize(DinoDetrEncoderLayer(tiny_config(num_feature_levels=3)))
    tokens, position, references = random_tokens(), random_tokens(), cell_centers(LEVELS)
    attended, _ = layer.self_attn(tokens + position, references, tokens, LEVELS)
    middle = layer.self_attn_norm(tokens + attended)
    hidden = layer.mlp.fc2(layer.mlp.fc1(middle).relu())
    expected = layer.mlp_norm(middle + hidden)
    torch.testing.assert_close(layer(tokens, position, references, LEVELS)[0], expected)


@pytest.mark.parametrize(("temperature", "offset"), [(20, 0), (10_000, -0.5)])
def test_tokens_are_placed_by_cell_and_by_level(temperature, offset):
    encoder = tiny_encoder(position_temperature=temperature, position_offset=offset)
    tokens, place = random_tokens(), []
    for level, (mask, (height, width)) in enumerate(zip(LEVELS.split(LEVELS.padding_mask), LEVELS.shapes, strict=True)):
        sine = embed_map(mask.view(2, height, width), 64, temperature, offset)
        for row in range(height):
            place += [sine[:, :, row, column] + encoder.level_embed.weight[level] for column in range(width)]
    place = torch.stack(place, dim=1)
    expected = tokens
    for layer in encoder.layers:
        expected, _ = layer(expected, place, cell_centers(LEVELS), LEVELS)
    torch.testing.assert_close(encoder(tokens, LEVELS)[0], expected)


def test_the_content_of_padding_reaches_no_other_token():
    encoder, tokens = tiny_encoder(), random_tokens()
    changed = torch.where(LEVELS.padding_mask[..., None], 50.0, tokens)
    before, after = encoder(tokens, LEVELS)[0], encoder(changed, LEVELS)[0]
    inside = ~LEVELS.padding_mask
    assert torch.equal(before[inside], after[inside])
    assert not torch.equal(before, after)


def test_the_images_of_a_batch_do_not_see_each_other():
    encoder, tokens = tiny_encoder(), random_tokens()
    changed = torch.stack([tokens[0] + 1, tokens[1]])
    before, after = encoder(tokens, LEVELS)[0], encoder(changed, LEVELS)[0]
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])


def test_the_states_of_each_layer_are_returned_on_request():
    encoder, tokens = tiny_encoder(), random_tokens()
    memory, hidden_states, points = encoder(tokens, LEVELS, True, True)
    assert len(hidden_states) == 2 + 1
    assert torch.equal(hidden_states[0], tokens)
    assert torch.equal(hidden_states[-1], memory)
    assert [one.weights.shape for one in points] == [(2, num_tokens(LEVELS), 4, 3, 2)] * 2
    for one in points:
        torch.testing.assert_close(one.weights.sum((-1, -2)), torch.ones(2, num_tokens(LEVELS), 4))


def test_no_states_are_returned_without_a_request():
    assert tiny_encoder()(random_tokens(), LEVELS)[1:] == (None, None)


def test_every_parameter_gets_a_gradient():
    encoder = tiny_encoder()
    encoder(random_tokens(), LEVELS)[0].square().sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []
    assert encoder.level_embed.weight.grad.any(-1).all()


def test_the_fusion_is_a_normalised_linear_function_of_the_states_of_all_layers():
    encoder, tokens = tiny_encoder(encoder_fusion=True), random_tokens()
    memory, hidden_states, _ = encoder(tokens, LEVELS, True)
    assert len(hidden_states) == 2 + 1
    plain = tiny_encoder()
    plain.load_state_dict({name: x for name, x in encoder.state_dict().items() if not name.startswith("fusion.")})
    last, plain_states, _ = plain(tokens, LEVELS, True)
    for state, expected in zip(hidden_states, plain_states, strict=True):
        torch.testing.assert_close(state, expected)
    weights = encoder.fusion.projection.weight.split(64, dim=1)
    mixed = sum(state @ weight.T for state, weight in zip(hidden_states, weights, strict=True))
    torch.testing.assert_close(memory, encoder.fusion.norm(mixed + encoder.fusion.projection.bias))
    assert torch.equal(encoder(tokens, LEVELS)[0], memory)
    assert not torch.allclose(memory, last)


def test_an_encoder_without_fusion_keeps_no_states_and_has_no_more_parameters():
    encoder = tiny_encoder()
    assert encoder.fusion is None
    assert not any("fusion" in name for name in encoder.state_dict())
    assert encoder(random_tokens(), LEVELS).hidden_states is None


def test_a_detector_with_fusion_trains_saves_and_exports(tmp_path):
    config = tiny_config(encoder_fusion=True, class_loss="stable_dino", ms_deform_attn_backend="torch")
    model = randomize(DinoDetrForObjectDetection(config), 0.1).train()
    pixels, mask = tiny_images()
    labels, losses, gradients = tiny_labels(3, 0), [], []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(pixels, mask, labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.encoder.fusion.projection.weight.grad.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].any()

    model.eval().save_pretrained(tmp_path)
    again = DinoDetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(pixels, mask).pred_boxes
        assert torch.equal(again(pixels, mask).pred_boxes, expected)
        graph = torch.export.export(again, (pixels, mask), strict=False)
        torch.testing.assert_close(graph.module()(pixels, mask).pred_boxes, expected, rtol=0, atol=1e-5)


def test_the_fusion_starts_with_the_initial_values_of_the_transformer():
    torch.manual_seed(0)
    fusion = DinoDetrForObjectDetection(tiny_config(encoder_fusion=True)).model.encoder.fusion
    bound = (6 / (3 * 64 + 64)) ** 0.5
    assert 0.95 * bound < fusion.projection.weight.abs().max() <= bound
    assert torch.equal(fusion.norm.weight, torch.ones(64))
