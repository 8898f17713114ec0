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
        epochs=12,
        train_batch=64,
        optimizer="adam",  # with SGD one class or another is more often never predicted
        lr=0.004,
        weight_decay=0.0,
        warmup=46,
        manualSeed=1,
        workers=1,
    )
}
