"""The synthesisers and recordings that fill a speech bank.

Every module has one class with the method of ``sound.Synthesiser``. They need the packages that
docs/TRAINING.md lists, and are imported only when a voice of theirs is asked to speak.

==============  ====================================================================
module          what speaks
==============  ====================================================================
``sound``       what all share: the spoken result, trimming, level
``espeak``      espeak-ng: formant voices in many variants; phonemes for the others
``flite``       CMU Flite: four small recorded voices
``pico``        SVOX Pico: one voice for each of six languages
``kokoro``      Kokoro-82M: neural voices
``piper``       Piper: one neural voice
``recordings``  people: telephone prompts, and music on hold
==============  ====================================================================
"""
