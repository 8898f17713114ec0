"""Named sets of defaults for the CIFAR programs: command line before preset before default."""

PRESETS = {
    # Alive from the first step, unlike the published low-latency recipes on images as flat as these digits.
    "quickstart": dict(
        dataset="digits",
        model="preresnet.resnet20_lif",
        timesteps=4,
        Vth=0.3,
        alpha=0.3,
        delta_t=0.2,
        epochs=15,
        train_batch=32,
        lr=0.05,
        warmup=300,  # with a short one a class can fall silent for good
        manualSeed=1,
        workers=1,
    ),
}
