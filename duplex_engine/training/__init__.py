"""Training of the reference interaction model, from synthetic speech to a checkpoint.

===============  ===================================================================
module           what it owns
===============  ===================================================================
``phrases``      every text that is spoken or put out
``vocabulary``   the token ids
``voices``       who speaks: every voice, its settings, its group
``speech``       the synthesisers and recordings behind the voices
``bank``         the spoken texts on disk, with the times of their words
``augment``      rooms, noise, codecs and the like, put on a clip or a stream
``episodes``     streams composed of clips, with what the model should put out
``rows``         an episode as the rows of a sequence
``model``        the small Inkling that is trained
``train``        the training loop
``export``       a trained checkpoint as the engine loads it
===============  ===================================================================
"""
