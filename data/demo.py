"""A dataset of our own making: what people say to a virtual assistant, drawn from a seeded grammar.

It is redundant as real logs are, a few patterns make up most of it and a long tail the rest, and about 2 % of its
train annotations (intent or slots) are wrong on purpose. Which ones is known (`planted_errors`), so it can tell
whether a score finds them. 7 intents, 32 slot types, 4,000 / 500 / 500 utterances.
"""

import re
from bisect import bisect
from functools import cache
from itertools import accumulate

import numpy as np

from .readers import Examples

SIZES = {"train": 4000, "dev": 500, "test": 500}
ERROR_SHARE = 0.02
SEED = 20230604


def parse_table(text):
    """{"name": [options]} from lines "name: option | option | …"; an indented line goes on with the one before it."""
    lines = text.strip().replace("\n    ", " ").splitlines()
    return {name: options.split(" | ") for name, _, options in (line.partition(": ") for line in lines)}


# Options are in order of frequency: the k-th is drawn with a probability proportional to 1 / k (Zipf).
PATTERNS = parse_table("""
SetAlarm: wake me up at {time} | set an alarm for {time} | set an alarm for {time} {date} | alarm at {time}
    {recurrence} | wake me {date} at {time} | set a {duration} timer | cancel my {alarm_name} alarm | timer for
    {duration} | set a {alarm_name} alarm for {time} {recurrence} | i need to be up by {time} {date} in the
    {part_of_day} | move the {alarm_name} alarm to {time} | do not let me sleep past {time} {recurrence}
GetWeather: what is the weather in {city} | will it {condition} {date} | weather {date} | is it going to {condition}
    in {city} | what is the weather like in {city} {date} | do i need an umbrella {date} {part_of_day} | forecast for
    {city} {country} | how cold is it in {city} right now | any chance it will {condition} {part_of_day} in {city}
    {country} | should i expect {condition} on the way to {city} {date} | is {country} warm {date}
PlayMusic: play {song} by {artist} | play some {genre} | play {artist} | put on my {playlist} playlist | play the
    album {album} | play {genre} on {service} | i want to hear {song} | listen to {artist} on {service} | shuffle
    {playlist} | play {song} from {album} by {artist} | something {genre} for the {part_of_day} | can {service} find
    {album} by {artist} | turn on {song}
SendMessage: text {contact} {message} | send a message to {contact} | tell {contact} {message} | message {contact} on
    {app} | send {contact} a text saying {message} | let {contact} know that {message} | ask {contact} on {app} when
    to meet {date} | reply to my {relation} {message} | write my {relation} on {app} that {message} | drop {contact} a
    line at {time}
AddToList: add {item} to my {list} list | add {item} to the list | put {quantity} {item} on my {list} list | we need
    {item} | remind me to buy {item} {date} | i am out of {item} | get {quantity} {item} from the {store} | add {song}
    to my {list} list | remember {quantity} {item} for {contact} | next time at the {store} i want {item}
GetDirections: directions to {place} | take me to {place} | how do i get to {street} | how long to {place} by
    {transport} | navigate to {place} in {city} | drive me to {place} and avoid {avoid} | fastest way to {street}
    {city} without {avoid} | is there a {transport} to {city} at {time} | i have to be at {place} by {time} | walk me
    from {street} to {place}
ControlHome: turn on the {device} | turn off the {device} in the {room} | set the {device} to {temperature} | dim the
    {room} {device} | make the {room} {temperature} | set the {device} to {percent} | turn the {room} {device} {color}
    | switch off the {device} in {duration} | is the {device} in the {room} still on | start the {device} at {time}
    {date} | leave the {device} at {percent} until {time}
""")

# The values of the slots. One may contain {parts}, which makes the open classes large without making this file so.
VALUES = parse_table("""
time: seven | six thirty | eight | half past {hour} | {hour} pm | quarter to {hour} | noon | {hour} {minutes} |
    midnight
date: tomorrow | today | tonight | on {weekday} | this weekend | next {weekday} | the day after tomorrow | in {hour}
    days
recurrence: every day | on weekdays | every {weekday} | every other {weekday} | twice a week
part_of_day: morning | evening | afternoon | night | early morning
duration: ten minutes | {hour} minutes | an hour | half an hour | {hour} hours | ninety seconds
alarm_name: morning | work | gym | medicine | {weekday} run | baking
city: london | paris | new york | berlin | san francisco | lagos | lima | hanoi | porto | jackson | florence | phoenix
country: france | germany | japan | brazil | new zealand | kenya | georgia | jordan
condition: rain | snow | storm | hail | freeze | get windy | thunder | fog
song: {adjective} {noun} | rain | {noun} of {noun} | the {noun} | {adjective} {weekday} | seven | yesterday was
    {adjective}
artist: the {noun}s | {first} {last} | {first} | dj {noun} | {last} and the {adjective} {noun}s | phoenix
album: {noun}s and {noun}s | {adjective} {noun} | live in {place_name} | the {adjective} album | {first}
genre: jazz | rock | classical | hip hop | country | house | soul | drum and bass | bossa nova | rain sounds
playlist: workout | road trip | chill | {weekday} {part} | cooking | songs for {first} | {adjective} {part}
service: streamly | tunebox | radio nine | my library | cloudbeat
contact: mom | {first} | dad | {first} {last} | doctor {last} | the office | georgia
message: i am late | happy birthday | i am on my way | call me back | dinner is at {hour} | the {noun} is {adjective}
    | see you {weekday} | please bring the {noun}
app: chatter | pigeon | mail | work chat | {noun}gram
relation: sister | boss | landlord | neighbour | oldest friend
item: milk | eggs | bread | coffee | {adjective} {food} | {food} | {food} and {food} | light bulbs | a {noun}
quantity: two | a dozen | {hour} | a bag of | {hour} boxes of | half a pound of
list: shopping | grocery | to do | {weekday} | party | {first} birthday | packing
store: supermarket | bakery | corner shop | hardware store | {last} market
place: home | work | the airport | the {noun} museum | {last} park | {first}'s house | the nearest {store_name} |
    central station
street: {number} {last} street | {last} avenue | {number} {noun} road | the corner of {last} and {last}
transport: car | bus | train | bike | night bus | ferry
avoid: highways | tolls | traffic | the {last} bridge | ferries
device: lights | heating | tv | fan | coffee machine | oven | {adjective} lamp | air conditioning | music
room: kitchen | bedroom | living room | bathroom | garage | {first}'s room | guest room
temperature: twenty degrees | warmer | cooler | {number} degrees | a bit colder
color: red | blue | warm white | {adjective} green
percent: fifty percent | full | {number} percent | half | minimum
""")

PARTS = parse_table("""
hour: five | six | seven | eight | nine | ten | eleven | two | three | four
minutes: fifteen | thirty | forty | twenty | ten | fifty
weekday: monday | friday | saturday | sunday | wednesday | thursday | tuesday
part: mix | morning | party | night | drive
number: twenty | forty | twelve | ninety | sixty | eighteen | thirty | seventy
first: anna | ben | maria | tom | lucy | omar | ines | viktor | yuki | paula | charlotte | jordan | noor | sam | tessa
last: miller | jackson | garcia | chen | okafor | silva | novak | lincoln | rossi | park | haddad | green | larsen
adjective: blue | golden | quiet | broken | electric | little | wild | green | frozen | sweet | old | red | lonely |
    warm
noun: river | summer | heart | train | moon | garden | ghost | mirror | dream | tiger | bridge | window | storm |
    sailor | engine
food: apples | rice | tomatoes | cheese | noodles | onions | chicken | yoghurt | olives | pears | lentils | honey
place_name: london | berlin | lisbon | osaka | texas | jordan
store_name: pharmacy | bakery | bank | cafe | post | office
""")

OPENINGS = ["", "please", "hey", "can you", "i would like you to", "ok now", "um"]
CLOSINGS = ["", "please", "thanks", "for me", "right away"]


@cache
def zipf(n):
    """Cumulative sums of 1 / k for k = 1 … n."""
    return list(accumulate(1 / k for k in range(1, n + 1)))


def draw(rng, options):
    """One of `options`, the k-th with a probability proportional to 1 / k."""
    sums = zipf(len(options))
    return options[bisect(sums, rng.random() * sums[-1])]


def fill(rng, text):
    """Replace each {part} of a slot value by one of PARTS."""
    return re.sub(r"\{(\w+)\}", lambda match: draw(rng, PARTS[match[1]]), text)


def utterance(rng, intent):
    """(words, tags) of one utterance with this intent."""
    words, tags = [], []

    def add(text, slot=None):
        for i, word in enumerate(text.split()):
            words.append(word)
            tags.append("O" if slot is None else f"{'I' if i else 'B'}-{slot}")

    if rng.random() < 0.25:
        add(draw(rng, OPENINGS))
    for word in draw(rng, PATTERNS[intent]).split():
        slot = word[1:-1] if word.startswith("{") else None
        add(fill(rng, draw(rng, VALUES[slot])) if slot else word, slot)
    if rng.random() < 0.15:
        add(draw(rng, CLOSINGS))
    if rng.random() < 0.03:  # as speech recognition does: two letters of a word change places
        i = rng.integers(len(words))
        j = rng.integers(len(words[i]))
        words[i] = words[i][:j] + words[i][j + 1 : j + 2] + words[i][j : j + 1] + words[i][j + 2 :]
    return words, tags


def planted_errors():
    """Indices of the train utterances whose annotation is wrong on purpose. Returns (80,) int64, ascending."""
    n = SIZES["train"]
    return np.sort(np.random.default_rng([SEED, 1]).permutation(n)[: round(ERROR_SHARE * n)])


def errors_found(scores):
    """How many planted errors are among the highest scores, looking at as many as there are errors.

    scores: (n,) of the first n train utterances. Returns (found, planted).
    """
    planted = planted_errors()
    planted = planted[planted < len(scores)]
    top = np.argsort(-scores, kind="stable")[: len(planted)]
    return int(np.isin(planted, top).sum()), len(planted)


def spoil(rng, examples, i):
    """Make the annotation of example i wrong: another intent, or another type for all its slots of one type."""
    types = sorted({tag[2:] for tag in examples.tags[i] if tag != "O"})
    if not types or rng.random() < 0.5:
        examples.labels[i] = str(rng.choice([intent for intent in PATTERNS if intent != examples.labels[i]]))
    else:
        old = str(rng.choice(types))
        new = str(rng.choice([slot for slot in VALUES if slot not in types]))
        examples.tags[i] = [tag[:2] + new if tag[2:] == old else tag for tag in examples.tags[i]]


def generate():
    """The three splits as {"train": Examples, …}, the same on every machine."""
    splits = {}
    for number, (split, size) in enumerate(SIZES.items()):
        rng = np.random.default_rng([SEED, 0, number])
        examples = Examples([], [], [])
        for _ in range(size):
            intent = draw(rng, list(PATTERNS))
            words, tags = utterance(rng, intent)
            examples.texts.append(words)
            examples.tags.append(tags)
            examples.labels.append(intent)
        splits[split] = examples
    rng = np.random.default_rng([SEED, 2])
    for i in planted_errors():
        spoil(rng, splits["train"], i)
    return splits
