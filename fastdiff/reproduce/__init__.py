"""Every system and every figure of the sources, each a recipe that uses the public interface and leaves a page.

:mod:`.recipes` are the recipes, :mod:`.studio` what they share (networks, samples, judgements), :mod:`.page` what they
leave behind and :mod:`.gallery` the page of pages.
"""
