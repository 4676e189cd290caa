"""Things and what else they may be called, without a word in common, for questions in other words.

Training asks about the first pairs of the table, evaluation about the others, so that a model or a
scorer cannot know a pair by heart.
"""

from __future__ import annotations

__all__ = ["HELD_OUT_PAIRS", "TRAIN_PAIRS"]

_TABLE = """
old barn = ancient farm building
loud trumpet = noisy brass horn
tiny spoon = very small cutlery piece
frozen lake = iced-over water
red truck = crimson lorry
broken clock = damaged timepiece
wet umbrella = soaked rain shelter
silver coin = shiny metal money
dark cellar = unlit basement
tall tower = high lookout building
sick horse = ill mare
stone bridge = rocky river crossing
little boat = small rowing vessel
empty bottle = drained glass flask
large kitchen = roomy place to cook
clever fox = sly red-furred hunter
heavy hammer = weighty tool for nails
wooden chair = seat carved of oak
quick courier = fast messenger
yellow flower = golden blossom
soft pillow = fluffy cushion
torn letter = ripped written message
hidden cave = secret hollow in the rock
blind musician = sightless violin player
sharp knife = keen cutting blade
round table = circular piece of furniture for meals
poor tailor = penniless maker of clothes
rich merchant = wealthy trader
young doctor = youthful physician
white church = pale house of worship
narrow street = slim city lane
fat goose = plump farm bird
black ship = ebony sailing craft
hot oven = heated baking chamber
steep hill = sharply rising ground
lost child = missing little boy
cheap hotel = inexpensive inn
iron gate = metal entrance of the park
muddy field = dirty farmland
angry teacher = furious school master
famous painter = well-known artist
blue carpet = azure floor rug
sleepy guard = drowsy watchman
thick book = bulky volume
deep well = far-down source of water
green frog = emerald pond hopper
bitter medicine = foul-tasting remedy
velvet curtain = heavy cloth before the window
burning candle = lit stick of wax
faded map = bleached chart of the land
dead tree = withered oak
long train = extended line of railway cars
cold soup = chilled broth
bright lantern = shining lamp
royal crown = king's golden headpiece
crowded market = busy trading square
happy widow = cheerful woman whose husband died
stolen necklace = pilfered string of pearls
retired soldier = former army man
small airport = minor landing ground for planes
rotten apple = spoiled fruit
cracked window = split pane of glass
rusty bicycle = corroded two-wheeler
wild garden = untended flower plot
new hospital = recently built clinic
leather bag = hide satchel
foreign sailor = seaman from abroad
deserted island = land in the sea where nobody lives
snowy mountain = white peak
drunk poet = tipsy writer of verses
giant statue = enormous sculpture
lazy cat = idle house pet
"""
_ALL = [tuple(line.split(" = ")) for line in _TABLE.strip().splitlines()]
_HELD_OUT = 24

TRAIN_PAIRS: list[tuple[str, str]] = _ALL[:-_HELD_OUT]
HELD_OUT_PAIRS: list[tuple[str, str]] = _ALL[-_HELD_OUT:]
