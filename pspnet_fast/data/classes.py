"""Class names and colours of the datasets, in the order of their labels.

ADE20K: the 150 classes of the scene parsing benchmark (Zhou et al., CVPR 2017), labels counted from 0, without "other".
PASCAL VOC 2012: 20 classes and the background. Cityscapes: the 19 training classes (trainIds). Colours are those of the
datasets' own tools.
"""

from __future__ import annotations

from typing import NamedTuple


class Classes(NamedTuple):
    """Names, and colours as (red, green, blue) from 0 to 255, by label."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]


def _table(text: str) -> Classes:
    """From lines of a colour in hexadecimal and a name."""
    rows = [line.split(maxsplit=1) for line in text.strip().splitlines()]
    colours = [bytes.fromhex(colour) for colour, _ in rows]
    return Classes(tuple(name for _, name in rows), tuple((r, g, b) for r, g, b in colours))


_ADE20K = """
787878 wall
b47878 building
06e6e6 sky
503232 floor
04c803 tree
787850 ceiling
8c8c8c road
cc05ff bed
e6e6e6 windowpane
04fa07 grass
e005ff cabinet
ebff07 sidewalk
96053d person
787846 earth
08ff33 door
ff0652 table
8fff8c mountain
ccff04 plant
ff3307 curtain
cc4603 chair
0066c8 car
3de6fa water
ff0633 painting
0b66ff sofa
ff0747 shelf
ff09e0 house
0907e6 sea
dcdcdc mirror
ff095c rug
7009ff field
08ffd6 armchair
07ffe0 seat
ffb806 fence
0aff47 desk
ff290a rock
07ffff wardrobe
e0ff08 lamp
6608ff bathtub
ff3d06 railing
ffc207 cushion
ff7a08 base
00ff14 box
ff0829 column
ff0599 signboard
0633ff chest of drawers
eb0cff counter
a09614 sand
00a3ff sink
8c8c8c skyscraper
fa0a0f fireplace
14ff00 refrigerator
1fff00 grandstand
ff1f00 path
ffe000 stairs
99ff00 runway
0000ff case
ff4700 pool table
00ebff pillow
00adff screen door
1f00ff stairway
0bc8c8 river
ff5200 bridge
00fff5 bookcase
003dff blind
00ff70 coffee table
00ff85 toilet
ff0000 flower
ffa300 book
ff6600 hill
c2ff00 bench
008fff countertop
33ff00 stove
0052ff palm
00ff29 kitchen island
00ffad computer
0a00ff swivel chair
adff00 boat
00ff99 bar
ff5c00 arcade machine
ff00ff hovel
ff00f5 bus
ff0066 towel
ffad00 light
ff0014 truck
ffb8b8 tower
001fff chandelier
00ff3d awning
0047ff streetlight
ff00cc booth
00ffc2 television receiver
00ff52 airplane
000aff dirt track
0070ff apparel
3300ff pole
00c2ff land
007aff bannister
00ffa3 escalator
ff9900 ottoman
00ff0a bottle
ff7000 buffet
8fff00 poster
5200ff stage
a3ff00 van
ffeb00 ship
08b8aa fountain
8500ff conveyer belt
00ff5c canopy
b800ff washer
ff001f plaything
00b8ff swimming pool
00d6ff stool
ff0070 barrel
5cff00 basket
00e0ff waterfall
70e0ff tent
46b8a0 bag
a300ff minibike
9900ff cradle
47ff00 oven
ff00a3 ball
ffcc00 food
ff008f step
00ffeb tank
85ff00 trade name
ff00eb microwave
f500ff pot
ff007a animal
fff500 bicycle
0abed4 lake
d6ff00 dishwasher
00ccff screen
1400ff blanket
ffff00 sculpture
0099ff hood
0029ff sconce
00ffcc vase
2900ff traffic light
29ff00 tray
ad00ff ashcan
00f5ff fan
4700ff pier
7a00ff crt screen
00ffb8 plate
005cff monitor
b8ff00 bulletin board
0085ff shower
ffd600 radiator
19c2c2 glass
66ff00 clock
5c00ff flag
"""

_VOC2012 = """
000000 background
800000 aeroplane
008000 bicycle
808000 bird
000080 boat
800080 bottle
008080 bus
808080 car
400000 cat
c00000 chair
408000 cow
c08000 diningtable
400080 dog
c00080 horse
408080 motorbike
c08080 person
004000 pottedplant
804000 sheep
00c000 sofa
80c000 train
004080 tvmonitor
"""

_CITYSCAPES = """
804080 road
f423e8 sidewalk
464646 building
66669c wall
be9999 fence
999999 pole
faaa1e traffic light
dcdc00 traffic sign
6b8e23 vegetation
98fb98 terrain
4682b4 sky
dc143c person
ff0000 rider
00008e car
000046 truck
003c64 bus
005064 train
0000e6 motorcycle
770b20 bicycle
"""

CLASSES = {"ade20k": _table(_ADE20K), "voc2012": _table(_VOC2012), "cityscapes": _table(_CITYSCAPES)}
