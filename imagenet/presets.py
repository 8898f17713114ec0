"""The paper's chain on ImageNet as named sets of defaults: ANN, thresholds, SNN. One after the other.

name -> (the paper's accuracy, settings). The stages find each other's files by their names.
"""

ROWS = {
    # The ANN's accuracy is not published; its recipe is that of the official command.
    "main-imagenet-ann": (
        "",
        dict(
            model="preresnet_ann.resnet18",
            name="main-imagenet-ann",
            optimizer="sgd",
            weight_decay=1e-4,
            train_batch=256,
            lr=0.1,
        ),
    ),
    "main-imagenet-calibrate": (
        "",
        dict(
            model="preresnet_cal_Vth.resnet18",
            pre_train="main-imagenet-ann.pth",
            calculate_Vth="main-imagenet-calibrate",
        ),
    ),
    "main-imagenet-snn": (
        "67.74",
        dict(
            model="preresnet_snn.resnet18_if",
            name="main-imagenet-snn",
            pre_train="main-imagenet-ann.pth",
            load_Vth="main-imagenet-calibrate.dict",
        ),
    ),
}
PRESETS = {name: settings for name, (_, settings) in ROWS.items()}
