"""The instruments of General MIDI that pieces are written for: program, family, compass and duties."""

from __future__ import annotations

from dataclasses import dataclass

# the lead's register: MIDI numbers of the lowest and the highest note of the melody
REGISTERS = {'low': (31, 55), 'middle': (55, 74), 'high': (72, 93)}
SMALLEST_SPAN = 9  # semitones that a melody needs


@dataclass(frozen=True)
class Instrument:
    """One program of General MIDI.

    Fields:
        name: as it stands in labels.
        program: 0 to 127.
        family: one of `FAMILIES`.
        low, high: MIDI numbers between which it sounds like itself.
        duties: what it may do in an arrangement: l lead, c chords, p sustained chords, b bass, k a second voice.
        level: dB to be added, so that all are about as loud as the piano (mean of FluidR3 and MuseScore General).
    """

    name: str
    program: int
    family: str
    low: int
    high: int
    duties: str
    level: float

    @property
    def registers(self) -> tuple[str, ...]:
        """The registers in which a melody has room."""
        return tuple(name for name in REGISTERS if self.span(name)[1] - self.span(name)[0] >= SMALLEST_SPAN)

    def span(self, register: str) -> tuple[int, int]:
        """The lowest and the highest note of a melody in `register`."""
        low, high = REGISTERS[register]
        return max(low, self.low), min(high, self.high)


_TABLE = """
piano                0   keyboard   28  100 lc      0
honky-tonk piano     3   keyboard   36   93 lc      1
electric piano       4   keyboard   36   93 lcp    -7
harpsichord          6   keyboard   36   86 lc     -3
clavinet             7   keyboard   36   84 lc     -4
celesta              8   mallets    60  100 lck    -3
glockenspiel         9   mallets    72  103 lk     -4
music box           10   mallets    60   96 lck     0
vibraphone          11   mallets    53   89 lck    -2
marimba             12   mallets    45   93 lck    -3
xylophone           13   mallets    65  100 lk      4
tubular bells       14   mallets    57   77 lk     -6
kalimba            108   mallets    55   88 lk      0
steel drums        114   mallets    55   86 lk     -2
hammond organ       16   organ      36   93 lcp    -3
rock organ          18   organ      36   93 lcp    -5
church organ        19   organ      36   96 lcp    -5
accordion           21   free_reed  50   90 lcp    -2
harmonica           22   free_reed  58   90 lk     -6
nylon guitar        24   guitar     40   83 lc     -4
steel guitar        25   guitar     40   83 lc     -3
jazz guitar         26   guitar     40   83 lc     -5
clean guitar        27   guitar     40   86 lc     -6
overdriven guitar   29   guitar     40   88 lc     -7
distorted guitar    30   guitar     40   88 lc     -9
harp                46   plucked    36   96 lc     -3
sitar              104   plucked    48   77 lk     -2
banjo              105   plucked    48   84 lc     -4
koto               107   plucked    50   84 lk     -2
upright bass        32   bass       28   55 lb     -6
electric bass       33   bass       28   57 lb     -7
picked bass         34   bass       28   57 lb     -6
fretless bass       35   bass       28   60 lb     -8
slap bass           36   bass       28   57 lb     -2
synth bass          38   bass       28   57 lb     -5
violin              40   strings    55   98 lk     -5
viola               41   strings    48   86 lk     -3
cello               42   strings    36   76 lkb    -4
double bass         43   strings    28   58 lb     -1
pizzicato strings   45   strings    36   88 lc     -1
string ensemble     48   strings    36   93 lp     -3
fiddle             110   strings    55   93 lk     -3
choir               52   voice      45   79 lp      0
voice oohs          53   voice      45   79 lp     -6
trumpet             56   brass      54   84 lk     -7
trombone            57   brass      38   72 lk    -10
tuba                58   brass      28   58 lb     -9
muted trumpet       59   brass      54   82 lk     -8
french horn         60   brass      38   74 lkp    -7
brass section       61   brass      43   84 lkp    -6
soprano sax         64   woodwind   56   88 lk     -9
alto sax            65   woodwind   49   81 lk     -7
tenor sax           66   woodwind   44   76 lk     -6
baritone sax        67   woodwind   36   69 lk     -5
oboe                68   woodwind   58   90 lk     -7
english horn        69   woodwind   52   81 lk      0
bassoon             70   woodwind   34   72 lkb    -6
clarinet            71   woodwind   50   90 lk     -8
piccolo             72   woodwind   74  102 l      -8
flute               73   woodwind   60   96 lk     -9
recorder            74   woodwind   65   91 lk     -9
pan flute           75   woodwind   60   88 lk     -7
whistle             78   woodwind   72  100 l     -12
ocarina             79   woodwind   60   88 l     -10
synth strings       50   synth      36   93 lp     -4
synth brass         62   synth      36   84 lcp    -4
square lead         80   synth      36   96 lck    -6
saw lead            81   synth      36   96 lck    -6
warm pad            89   synth      40   88 lp      4
polysynth           90   synth      40   88 lcp    -6
sweep pad           95   synth      40   88 p      -4
"""


def _read(table: str) -> dict[str, Instrument]:
    found = {}
    for row in table.strip().splitlines():
        *words, program, family, low, high, duties, level = row.split()
        name = ' '.join(words)
        family = family.replace('_', ' ')
        found[name] = Instrument(name, int(program), family, int(low), int(high), duties, float(level))
    return found


INSTRUMENTS = _read(_TABLE)
FAMILIES = tuple(dict.fromkeys(it.family for it in INSTRUMENTS.values()))
LEADS = {
    family: tuple(it.name for it in INSTRUMENTS.values() if it.family == family and 'l' in it.duties)
    for family in FAMILIES
}
BY_PROGRAM = {it.program: it.name for it in INSTRUMENTS.values()}
