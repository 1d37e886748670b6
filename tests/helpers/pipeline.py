"""A recipe of a whole tiny MusicLM."""

STEPS = dict(batch_size=2, num_train_steps=2, warmup_steps=1)


STAGE = dict(dim=16, depth=1, heads=2)


TINY = dict(
    mulan=dict(
        audio=dict(dim=32, depth=1, heads=2, audio_sample_rate=8000, support_variable_length=True),
        text=dict(dim=32, depth=1, heads=2),
        mulan=dict(dim_latent=16),
        training=dict(**STEPS, valid_frac=0.4),
    ),
    quantizer=dict(rq_num_quantizers=2, codebook_size=2),
    tokenizer=dict(codebook_size=4),
    spectral_codec=dict(sample_rate=8000, codebook_size=4, num_quantizers=3, components=4, resolved_hz=2000.0),
    semantic=dict(model=STAGE, training=dict(**STEPS, seconds=0.5)),
    coarse=dict(model=dict(**STAGE, num_coarse_quantizers=1), training=dict(**STEPS, seconds=0.2)),
    fine=dict(model=dict(**STAGE, num_coarse_quantizers=1), training=dict(**STEPS, seconds=0.2)),
    musiclm=dict(sampling=dict(cond_scale=2.0)),
)
