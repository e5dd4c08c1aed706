"""Teacher tokens for a batch, normalised and on the device, from stores or from live teachers.

    cached, live  CachedSource and LiveSource: tokens from stores, or from teachers that run now
    marks         what is known of rows without their patches
    live_rows     rows that a store lacks, computed and encoded as a build would
    sources       FeatureSource (law 8): what both are
    codec_torch   the codecs of `cache.codec` on the device, fused with the loss normaliser (law 9)
    grid_torch    of these, the grid codecs
    codec_steps   steps that codecs share: unpacking, packing, turning tokens back
    buffers       host memory that batches are read into, and its way to the device

A source knows rows and views. Which of them a step wants is the business of training, how a
store is filled that of caching, which encodes by `codec_torch` too.

Imports images, recipe and machines; imported by caching, training and the wings above them.
"""
