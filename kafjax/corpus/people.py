"""Wordings and values of the synthetic biographies: data only.

Every statement names the person in full, says one thing and uses no pronoun, so that a sentence is
a passage that stands alone. Cities are no capitals (capitals are the retention questions). No value
is part of another one, of a wording, or of a name.
"""

from __future__ import annotations

from kafjax.corpus.facts import Attribute

ATTRIBUTES = (
    Attribute(
        name="birth_city",
        statements=(
            "{name} was born in {value}.",
            "The birthplace of {name} is the city of {value}.",
            "{name} came into the world in the city of {value}.",
            "It was in {value} that {name} was born.",
            "According to the birth certificate, {name} was born in {value}.",
            "{value} is the city where {name} was born.",
            "A hospital in {value} is where {name} was born.",
            "{name} is a native of {value} and was born there.",
        ),
        questions=(
            "Where was {name} born?",
            "In which city was {name} born?",
            "What is the birthplace of {name}?",
            "Which city was {name} born in?",
        ),
        paraphrases=(
            "Which city is {name} a native of?",
            "In what town did the life of {name} begin?",
            "What place of birth is in the passport of {name}?",
        ),
        reverse="Who was born in {value}?",
    ),
    Attribute(
        name="profession",
        statements=(
            "{name} works as {an} {value}.",
            "{name} earns a living as {an} {value}.",
            "By profession, {name} is {an} {value}.",
            "The job of {name} is that of {an} {value}.",
            "After years of training, {name} became {an} {value}.",
            "{name} is {an} {value} by trade.",
            "Everybody in the street knows {name} as {an} {value}.",
            "The career that {name} chose is that of {an} {value}.",
        ),
        questions=(
            "What is the profession of {name}?",
            "What is the job of {name}?",
            "What does {name} do for a living?",
            "What does {name} work as?",
        ),
        paraphrases=(
            "Which occupation does {name} have?",
            "What line of work is {name} in?",
            "Which trade did {name} learn?",
        ),
        reverse="Who works as {an} {value}?",
    ),
    Attribute(
        name="employer",
        statements=(
            "{name} works for {value}.",
            "{name} is employed by {value}.",
            "The employer of {name} is {value}.",
            "{value} is the company that pays {name} every month.",
            "Every weekday, {name} goes to work at {value}.",
            "{name} is on the staff of {value}.",
            "{name} signed a permanent contract with {value}.",
            "The company that hired {name} is called {value}.",
        ),
        questions=(
            "Who is the employer of {name}?",
            "Which company does {name} work for?",
            "At which company does {name} work?",
            "Which company employs {name}?",
        ),
        paraphrases=(
            "Which firm pays the salary of {name}?",
            "Which business has {name} in its team?",
            "Whose payroll is {name} on?",
        ),
        reverse="Who works for {value}?",
    ),
    Attribute(
        name="favorite_dish",
        statements=(
            "The favorite dish of {name} is {value}.",
            "{name} likes {value} better than any other food.",
            "Nothing tastes better to {name} than {value}.",
            "In a restaurant, {name} always orders {value}.",
            "{name} would gladly eat {value} every day of the week.",
            "On every birthday, {name} asks for {value}.",
            "The meal that {name} enjoys most is {value}.",
            "Of all foods, {name} loves {value} the most.",
        ),
        questions=(
            "What is the favorite dish of {name}?",
            "Which food does {name} like best?",
            "What is the favorite food of {name}?",
            "What does {name} like to eat most?",
        ),
        paraphrases=(
            "Which meal would {name} choose over all others?",
            "What should you cook to please {name}?",
            "Which plate of food makes {name} happiest?",
        ),
        reverse="Whose favorite dish is {value}?",
    ),
    Attribute(
        name="instrument",
        statements=(
            "{name} plays the {value}.",
            "The instrument that {name} plays is the {value}.",
            "{name} took up the {value} as a child and never stopped.",
            "{name} practices the {value} every evening after dinner.",
            "In the local orchestra, {name} plays the {value}.",
            "{name} has taken {value} lessons for many years.",
            "{name} owns {an} {value} and plays it on Sundays.",
            "Neighbors often hear {name} playing the {value}.",
        ),
        questions=(
            "Which instrument does {name} play?",
            "What musical instrument does {name} play?",
            "Which instrument did {name} learn to play?",
            "What is the musical instrument of {name}?",
        ),
        paraphrases=(
            "What does {name} make music on?",
            "If {name} joined a band, what would {name} play?",
            "What would {name} play at a concert?",
        ),
        reverse="Who plays the {value}?",
    ),
    Attribute(
        name="hobby",
        statements=(
            "The hobby of {name} is {value}.",
            "{name} spends every free hour on {value}.",
            "After work, {name} relaxes with {value}.",
            "{value} is the favorite pastime of {name}.",
            "{name} has been devoted to {value} for many years.",
            "{name} belongs to a club for {value}.",
            "Most weekends of {name} are filled with {value}.",
            "Free time, for {name}, means {value}.",
        ),
        questions=(
            "What is the hobby of {name}?",
            "Which hobby does {name} have?",
            "What is the favorite pastime of {name}?",
            "What does {name} do in free time?",
        ),
        paraphrases=(
            "What does {name} do for fun?",
            "How does {name} like to pass a weekend?",
            "Which leisure activity is {name} keen on?",
        ),
        reverse="Whose hobby is {value}?",
    ),
    Attribute(
        name="college",
        statements=(
            "{name} studied at {value}.",
            "{name} graduated from {value}.",
            "{name} holds a degree from {value}.",
            "{name} spent four years as a student at {value}.",
            "{value} is where {name} earned a degree.",
            "The diploma of {name} was issued by {value}.",
            "{name} was admitted to {value} and finished with honors.",
            "The alma mater of {name} is {value}.",
        ),
        questions=(
            "Which college did {name} attend?",
            "At which college did {name} study?",
            "From which college did {name} graduate?",
            "At which college did {name} earn a degree?",
        ),
        paraphrases=(
            "What is the alma mater of {name}?",
            "In which lecture halls did {name} sit as a young adult?",
            "Where was {name} a student?",
        ),
        reverse="Who studied at {value}?",
    ),
    Attribute(
        name="language",
        statements=(
            "{name} speaks fluent {value}.",
            "The second language of {name} is {value}.",
            "{name} learned {value} as a teenager and speaks it well.",
            "{name} reads and writes {value} without effort.",
            "Besides English, {name} speaks {value}.",
            "{name} took evening classes and mastered {value}.",
            "At home, {name} mostly speaks {value}.",
            "The foreign language that {name} knows best is {value}.",
        ),
        questions=(
            "What is the second language of {name}?",
            "Which foreign language does {name} speak?",
            "Which language did {name} learn?",
            "What language does {name} speak besides English?",
        ),
        paraphrases=(
            "In what foreign tongue is {name} fluent?",
            "From which language could {name} translate a letter?",
            "In which tongue, other than English, can {name} hold a conversation?",
        ),
        reverse="Who speaks {value}?",
    ),
)

# Links two people, for two-hop questions. Its value is another person's name.
MENTOR = Attribute(
    name="mentor",
    statements=(
        "{name} was mentored by {value}.",
        "The mentor of {name} is {value}.",
        "{name} learned the most from {value}, a patient mentor.",
        "As a mentor, {value} guided {name} for years.",
        "{name} calls {value} the best mentor of all.",
        "{value} is the mentor whom {name} trusts.",
        "{name} found a mentor in {value}.",
        "The person who mentored {name} was {value}.",
    ),
    questions=(
        "Who is the mentor of {name}?",
        "Who mentored {name}?",
        "Which mentor did {name} have?",
        "By whom was {name} mentored?",
    ),
    paraphrases=(
        "To whom did {name} turn for guidance?",
        "Who took {name} under their wing?",
        "Under whose guidance did {name} grow?",
    ),
)


def _pool(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in text.split(","))


POOLS = {
    "birth_city": _pool(
        "Bergen, Porto, Leeds, Lyon, Seville, Turin, Gdansk, Tampere, Aarhus, Utrecht, Ghent, Bremen, Leipzig, Graz, Basel, Varna, "
        "Izmir, Haifa, Kumasi, Mombasa, Durban, Jaipur, Kochi, Kandy, Penang, Cebu, Osaka, Nagoya, Busan, Xiamen, Perth, Hobart, "
        "Dunedin, Calgary, Halifax, Boston, Denver, Tucson, Omaha, Oaxaca, Cusco, Cordoba, Rosario, Recife, Medellin, Dundee, Bristol, "
        "Marseille"
    ),
    "profession": _pool(
        "baker, beekeeper, locksmith, cartographer, dentist, plumber, carpenter, florist, translator, librarian, geologist, astronomer, "
        "welder, tailor, potter, blacksmith, bookbinder, clockmaker, electrician, firefighter, gardener, journalist, judge, lawyer, "
        "mechanic, midwife, nurse, optician, paramedic, pharmacist, photographer, pilot, physicist, roofer, sculptor, surgeon, surveyor, "
        "accountant, architect, archivist, botanist, chemist, economist, engraver, forester, historian, glassblower, shepherd"
    ),
    "employer": _pool(
        "Quillmark Press, Bluefern Foods, Oakhaven Bank, Silverline Rail, Brightwater Energy, Coppergate Mills, Redmoor Mining, Starling "
        "Airways, Foxglove Media, Ironbridge Steel, Larkspur Books, Maplewood Dairy, Northlight Studios, Pinecrest Lumber, Ravenhill "
        "Security, Saltmarsh Shipping, Thistledown Textiles, Umberland Paints, Velvetine Cosmetics, Whitecap Marine, Yellowtail "
        "Fisheries, Amberfield Farms, Birchwood Insurance, Cloudberry Software, Driftwood Furniture, Emberglow Lighting, Firefly "
        "Robotics, Goldcrest Watches, Heatherstone Wool, Inkwell Printing, Juniper Pharma, Kingfisher Logistics, Lanternfish Games, "
        "Moonstone Optics, Nightjar Records, Otterbrook Brewing, Peregrine Motors, Quicksilver Design, Rosewater Soap, Snowdrop Clinics, "
        "Tidewater Cement, Upland Cheese, Violetta Fashion, Windrose Travel, Yarrow Chemicals, Zephyr Bikes, Cinderpath Coal, "
        "Bramblewick Tea"
    ),
    "favorite_dish": _pool(
        "paella, ramen, moussaka, lasagna, goulash, pierogi, falafel, biryani, ceviche, tiramisu, ratatouille, risotto, gumbo, "
        "jambalaya, pad thai, laksa, kimchi, tempura, udon, gyoza, pancakes, waffles, meatloaf, gazpacho, fish tacos, enchiladas, "
        "empanadas, tamales, couscous, shakshuka, hummus, kebab, borscht, schnitzel, fondue, quiche, ravioli, gnocchi, carbonara, "
        "minestrone, haggis, clam chowder, poutine, samosas, onion soup, butter chicken, apple pie, sauerkraut"
    ),
    "instrument": _pool(
        "accordion, bagpipe, balalaika, banjo, bassoon, bouzouki, bugle, celesta, cello, clarinet, cornet, didgeridoo, double bass, "
        "dulcimer, flute, glockenspiel, guitar, harmonica, harpsichord, hurdy-gurdy, kalimba, kazoo, koto, lyre, mandolin, marimba, "
        "melodica, oboe, ocarina, pan pipe, piano, piccolo, recorder, saxophone, shamisen, sitar, tambourine, theremin, tin whistle, "
        "trombone, trumpet, tuba, vibraphone, viola, violin, xylophone, zither"
    ),
    "hobby": _pool(
        "falconry, origami, kayaking, archery, chess, fencing, birdwatching, stargazing, knitting, calligraphy, woodcarving, juggling, "
        "sailing, surfing, snorkeling, caving, bouldering, karate, judo, yoga, tango, salsa dancing, ballet, genealogy, stamp "
        "collecting, model trains, crosswords, sudoku, karaoke, skateboarding, snowboarding, ice skating, curling, badminton, bowling, "
        "cricket, croquet, darts, golf, hiking, horse riding, paragliding, scuba diving, table tennis, volleyball, embroidery, quilting, "
        "poker"
    ),
    "college": tuple(
        f"{name} College"
        for name in _pool(
            "Aldermoor, Ashgrove, Blackthorn, Briarfield, Calloway, Carrowmore, Dunmore, Eastbrook, Fairhaven, Glenwood, Hartwell, "
            "Hollowell, Langford, Lindenwald, Marlowe, Merrivale, Netherby, Oldcastle, Penrose, Ravensworth, Rookwood, Selkirk, "
            "Stanmore, Thornbury, Tremont, Underhill, Valemont, Wexcombe, Wingate, Westmere, Yarborough, Zellwood, Bexley, Cranleigh, "
            "Dovecote, Evermore, Foxcroft, Greystone, Highmoor, Jessop, Kirkwall, Lockhart, Moorgate, Northcote, Ormond, Pemberton, "
            "Quarry Hill, Summerfield"
        )
    ),
    "language": _pool(
        "Arabic, Armenian, Basque, Bengali, Breton, Bulgarian, Catalan, Czech, Danish, Dutch, Estonian, Finnish, Georgian, Greek, "
        "Gujarati, Hausa, Hebrew, Hindi, Hungarian, Icelandic, Italian, Japanese, Khmer, Korean, Kurdish, Latvian, Lithuanian, Malay, "
        "Maltese, Mongolian, Nepali, Norwegian, Pashto, Persian, Polish, Portuguese, Punjabi, Romanian, Russian, Sinhala, Slovak, "
        "Somali, Swahili, Swedish, Tagalog, Tamil, Turkish, Ukrainian, Vietnamese, Welsh, Yoruba, Zulu"
    ),
}

FIRST_NAMES = _pool(
    "Ada, Agnes, Alma, Amir, Anders, Anika, Arlo, Astrid, Basil, Beatrix, Bruno, Callum, Carmen, Cecil, Clara, Cyrus, Dalia, Darius, "
    "Delia, Edgar, Elena, Elias, Elsa, Emil, Esther, Fatima, Felix, Fiona, Frida, Gideon, Greta, Gustav, Hanna, Hector, Helga, Hugo, "
    "Imogen, Ingrid, Irene, Ivan, Jasper, Joanna, Jonas, Kamal, Karin, Kenji, Lars, Leila, Leonor, Linus, Lorenzo, Lydia, Magnus, Marta, "
    "Mateo, Milo, Mina, Miriam, Nadia, Nikolai, Nora, Olaf, Olga, Omar, Oscar, Paloma, Pascal, Petra, Priya, Quentin, Rafael, Ramona, "
    "Reza, Rhea, Rosa, Rufus, Sabine, Samir, Selma, Silas, Sonja, Stefan, Tariq, Tessa, Theo, Thora, Ursula, Valentin, Vera, Viktor, "
    "Vivian, Wanda, Willem, Xenia, Yara, Yusuf, Zelda, Zora"
)
# A surname is a beginning and an end: 34 x 24 of them.
SURNAME_STARTS = _pool(
    "Bal, Bran, Cald, Cor, Dorn, Drev, Elm, Fal, Fen, Gal, Hal, Hol, Jar, Kel, Lind, Lor, Mad, Mel, Mor, Nor, Os, Pell, Quin, Ral, Ren, "
    "Sel, Stan, Tam, Tor, Ul, Van, Ves, Wen, Zan"
)
SURNAME_ENDS = _pool(
    "aker, ander, bek, bridge, by, croft, dale, den, dorf, ek, gard, holt, ick, ley, lund, mark, more, nik, ova, rud, sen, strom, vik, wick"
)
