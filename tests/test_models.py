import pytest
import torch
from torchvision.models import VisionTransformer

from blockvit import models


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "size", "parameters"), [("vit_digits", 8, 0.80e6), ("vit_cifar", 32, 6.27e6)])
def test_small_models(name, size, parameters):
    model = models.create(name).eval()
    assert type(model) is VisionTransformer
    assert count(model) == pytest.approx(parameters, rel=0.01)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_block_sizes_divide_the_cifar_model():
    widths = {size for layer in models.create("vit_cifar").modules() if hasattr(layer, "in_features")
              for size in (layer.in_features, layer.out_features)}  # fmt: skip
    assert widths == {384, 10}  # the head's ten classes are the exception
    assert 384 % 64 == 0


def test_torchvision_models_take_their_own_arguments():
    model = models.create("vit_b_32", num_classes=7, image_size=64).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    assert model.hidden_dim == 768


def test_kwargs_override_the_small_models_settings():
    model = models.create("vit_digits", num_layers=1, num_classes=3, image_size=16).eval()
    assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)


def test_seed_fixes_the_weights():
    def first_weight(seed):
        torch.manual_seed(seed)
        return models.create("vit_digits").encoder.pos_embedding

    assert torch.equal(first_weight(0), first_weight(0))
    assert not torch.equal(first_weight(0), first_weight(1))


def test_position_embedding_is_as_large_as_what_it_is_added_to():
    torch.manual_seed(0)
    assert models.create("vit_digits").encoder.pos_embedding.std().item() == pytest.approx(0.5, rel=0.05)


def test_unknown_name_gives_the_nearest_and_the_list():
    with pytest.raises(ValueError, match=r"'vit_b16' \(did you mean 'vit_b_16'\?\).*vit_digits.*vit_h_14"):
        models.create("vit_b16")
    with pytest.raises(ValueError, match=r"unknown model 'resnet'; expected one of"):
        models.create("resnet")


def test_every_name_is_known():
    assert models.names() == [
        "vit_digits",
        "vit_cifar",
        "vit_cifar_small",
        "vit_b_16",
        "vit_b_32",
        "vit_l_16",
        "vit_h_14",
    ]


def test_unknown_keyword():
    with pytest.raises(TypeError, match="num_clases"):
        models.create("vit_digits", num_clases=3)
