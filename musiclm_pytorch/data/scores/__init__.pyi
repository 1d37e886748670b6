from .dataset import ScoreMusic as ScoreMusic
from .labels import ScoreLabels as ScoreLabels
from .rendering import find_sound_font as find_sound_font
