"""Codecs: how a row of patch tokens is kept, and what that keeps of it. numpy, the oracle.

    known        the codecs there are, by name; what a codec is
    quantised    int8, rot4, rot3, rot2: fitted to moments, packed, with escapes
    grid         grid0.5 ... grid4: a picture's patches together, fitted to whole rows
    plain        float32, float16, bfloat16, uint8: rounded
    grid_transform   of the grid codecs: along the grid and the channels
    rotation     the seeded rotation of the rotated codecs
    encoded      what a codec gives: rows as stored, their validity, escapes

An arrow runs downwards. Nothing here opens a file; the rest of `cache` asks `known` for a codec
and looks at no other file but `encoded`. The twin of each codec in torch is
`pipelines.features.codec_torch`.
"""
