"""Training of the reference interaction model, from synthetic speech to a checkpoint.

===============  ===================================================================
module           what it owns
===============  ===================================================================
``phrases``      every text that is spoken or put out
``vocabulary``   the token ids
``voices``       who speaks: every voice, its settings, its group
``speech``       the synthesisers and recordings behind the voices
``bank``         the spoken texts on disk, with the times of their words
``sounds``       coughs, clicks and the like
``augment``      rooms, noise, codecs and the like, put on a clip or a stream
``stage``        the clock, the sound and the targets of one stream
``tasks_*``      what happens on the stage: lists, talk, seeing
``episodes``     streams composed of such scenes, with what the model should put out
``rows``         an episode as the rows of a sequence
``shards``       ready episodes on disk
``model``        the small Inkling that is trained
``decoder``      its layers, faster
``train``        the training loop
``curves``       how it went, drawn
``export``       a trained checkpoint as the engine loads it
``command``      how its commands end on an error of their user
``showcase``     the recording that `duplex-engine demo` plays
===============  ===================================================================
"""
